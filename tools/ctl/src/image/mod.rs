//! `vesiclectl image`: root file systems for guests.
//!
//! A source is a directory or an OCI image layout. The layers of an image are applied in memory ([`tree`]), where no
//! name of theirs can lead out of the image, and only what they come to is laid out as files for mke2fs. Owners, device
//! nodes and all else that takes root outside of an image is put right inside the finished one ([`ext4`]).

mod directory;
mod ext4;
mod lay_out;
mod layer;
mod oci;
#[cfg(test)]
mod tests;
mod tree;

use std::io;
use std::path::{Path, PathBuf};

use lexopt::{Arg, Parser, ValueExt};

use self::ext4::{Corrections, Needs};
use self::oci::Layout;
use self::tree::Tree;

/// What `vesiclectl image --help` prints.
pub const HELP: &str = "\
Makes root file systems for guests.

Usage: vesiclectl image build --output FILE [OPTION]... SOURCE

  --output FILE   the image: a raw ext4 file system, replaced if it exists
  --size MIB      its size [default: what SOURCE takes, and some room]
  --ref NAME      the image of that name, where the layout holds several

SOURCE is a directory, or an OCI image layout: a directory with an index.json, or a tar of one, as `skopeo copy` and
`buildah push` write to oci: and oci-archive:, and `docker save` since version 25. Of an image for several platforms
that for linux/amd64 is taken. Its layers may be plain, gzip or zstd; every digest is checked.

No root is needed. Layers keep their owners, modes, times, hard links, device nodes and file capabilities. What belongs
to the caller in a directory belongs to root in the image. /dev, /proc, /sys, /run, /tmp and /etc/resolv.conf are made
where they are missing, for a guest that cannot write to the image. It takes mke2fs and debugfs, from e2fsprogs.
";

/// Bytes per MiB.
const MIB: u64 = 1 << 20;
/// The largest image that ext4 with blocks of 4 KiB and 32-bit block numbers can be, in MiB.
const MAX_SIZE_MIB: u64 = 16 << 20;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the host's could not be used.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A tool is not there, or was not started.
    #[error("cannot run {tool}, which is in Debian's package e2fsprogs")]
    NoTool {
        /// Its name.
        tool: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("{tool} failed on an image of {size_mib} MiB: {said}")]
    Tool {
        /// Its name.
        tool: &'static str,
        /// The image's size.
        size_mib: u64,
        /// What it wrote to standard error.
        said: String,
    },
    /// More than an ext4 file system of that kind holds.
    #[error("an image of {0} MiB is larger than {MAX_SIZE_MIB} MiB")]
    TooLarge(u64),
    /// The image would be among the files it is made from.
    #[error("{} is inside the directory that it is made from", .0.display())]
    Inside(PathBuf),
    /// The layout is not one, or not one that can be used.
    #[error("{0}")]
    Layout(String),
    /// A document or a layer is not what its digest says.
    #[error("the blob {digest} is damaged: it has {found}")]
    Damaged {
        /// As it was asked for.
        digest: String,
        /// How it differs.
        found: String,
    },
    /// A layer cannot be applied.
    #[error("the layer {digest} cannot be applied")]
    Layer {
        /// The layer's digest.
        digest: String,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// An archive cannot be read.
    #[error("it is damaged, or no tar archive")]
    Archive(#[source] io::Error),
    /// A name in an image asks for what cannot be.
    #[error("{name:?} {why}")]
    Entry {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The layers hold more than anything that is meant to be booted.
    #[error("the layers hold more than {limit} {what}")]
    Bomb {
        /// The limit.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
}

impl Error {
    /// Wraps what the system said about `path`.
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }

    /// A complaint about an entry.
    fn entry(name: &[u8], why: &'static str) -> Self {
        Self::Entry { name: String::from_utf8_lossy(name).into_owned(), why }
    }
}

/// One `vesiclectl image build`.
#[derive(Debug)]
pub struct Build {
    source: PathBuf,
    output: PathBuf,
    size_mib: Option<u64>,
    reference: Option<String>,
}

impl Build {
    /// Takes the arguments that follow `image`; `None` if they ask for help.
    ///
    /// # Errors
    /// An argument that is unknown, missing or malformed.
    pub fn parse(parser: &mut Parser) -> Result<Option<Self>, lexopt::Error> {
        let (mut words, mut output, mut size_mib, mut reference) = (Vec::new(), None, None, None);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("output") => output = Some(parser.value()?.into()),
                Arg::Long("size") => size_mib = Some(parser.value()?.parse()?),
                Arg::Long("ref") => reference = Some(parser.value()?.string()?),
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                Arg::Value(word) if words.len() < 2 => words.push(word),
                _ => return Err(argument.unexpected()),
            }
        }
        let mut words = words.into_iter();
        if words.next().is_none_or(|word| word != "build") {
            return Err("image takes build; --help says how".into());
        }
        let source = words.next().ok_or("SOURCE is missing")?.into();
        Ok(Some(Self { source, output: output.ok_or("--output is missing")?, size_mib, reference }))
    }

    /// Makes the image. What is at its path is only replaced by a whole one.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn run(&self) -> Result<(), Error> {
        let parent = match self.output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // Beside the image: there is room, and a rename is enough at the end.
        let work = vesiclectl::scratch::directory(".vesiclectl-", parent);
        let work = work.map_err(Error::io("make a directory in", parent))?;
        let image = work.path().join("image");

        let meta = std::fs::metadata(&self.source).map_err(Error::io("read", &self.source))?;
        if meta.is_dir() && !self.source.join("oci-layout").exists() {
            self.of_directory(parent, &image)?;
        } else {
            self.of_layout(&Layout::open(&self.source)?, work.path(), &image)?;
        }
        std::fs::rename(&image, &self.output).map_err(Error::io("write", &self.output))
    }

    fn of_directory(&self, parent: &Path, image: &Path) -> Result<(), Error> {
        let path = |path: &Path| path.canonicalize().map_err(Error::io("read", path));
        if path(parent)?.starts_with(path(&self.source)?) {
            return Err(Error::Inside(self.output.clone()));
        }
        let (corrections, needs) = directory::survey(&self.source)?;
        self.make(&self.source, image, corrections, needs)
    }

    fn of_layout(&self, layout: &Layout, work: &Path, image: &Path) -> Result<(), Error> {
        let mut tree = Tree::new(work.join("files"))?;
        for digest in layout.layers(self.reference.as_deref())? {
            let apply = |blob: &mut dyn io::Read| layer::apply(&mut tree, blob);
            let applied = layout.read_layer(&digest, apply);
            applied.map_err(|source| Error::Layer { digest: digest.to_string(), source: Box::new(source) })?;
        }
        tree.complete()?;
        let root = work.join("root");
        let (corrections, needs) = lay_out::lay_out(&tree, &root)?;
        self.make(&root, image, corrections, needs)
    }

    fn make(&self, root: &Path, image: &Path, corrections: Corrections, needs: Needs) -> Result<(), Error> {
        let size_mib = self.size_mib.unwrap_or_else(|| needs.size_mib());
        if size_mib > MAX_SIZE_MIB {
            return Err(Error::TooLarge(size_mib));
        }
        ext4::make(root, image, size_mib, needs)?;
        ext4::correct(image, size_mib, corrections)
    }
}
