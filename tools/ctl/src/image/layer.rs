//! A layer: a tar archive of what it adds, with names that say what it takes away.
//!
//! As in the OCI image specification, "Image Layer Filesystem Changeset": `.wh.NAME` takes NAME away, `.wh..wh..opq`
//! all that lower layers have in its directory, and neither anything of its own layer.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use tar::{Archive, Entry, EntryType};

use super::Error;
use super::tree::{Attributes, Kind, Meta, Tree};

/// Most bytes of headers for one entry, long names and extended headers included.
pub const MAX_HEADERS: u64 = 1 << 20;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names that begin like this belong to a file system that images were once made with.
const AUFS: &[u8] = b".wh..wh.";
/// The longest name of an extended attribute, in bytes, that Linux takes.
const MAX_ATTRIBUTE: usize = 255;

/// Reads so much and no more. An archive's headers are kept in memory, and say themselves how long they are.
#[derive(Debug)]
pub struct Bounded<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R> Bounded<R> {
    /// Reads from `inner`, and with it comes what it may still read.
    pub fn new(inner: R) -> (Self, Rc<Cell<u64>>) {
        let left = Rc::new(Cell::new(MAX_HEADERS));
        (Self { inner, left: Rc::clone(&left) }, left)
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 && !buffer.is_empty() {
            return Err(io::Error::other(format!("an entry has more than {MAX_HEADERS} bytes of headers")));
        }
        let most = usize::try_from(self.left.get()).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.inner.read(&mut buffer[..most])?;
        self.left.set(self.left.get() - count as u64);
        Ok(count)
    }
}

impl<R: Seek> Seek for Bounded<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

/// Applies the layer that `blob` reads, compressed or not, on top of what the tree has.
pub fn apply(tree: &mut Tree, blob: &mut dyn Read) -> Result<(), Error> {
    let mut blob = BufReader::with_capacity(64 << 10, blob);
    let plain: Box<dyn Read> = match blob.fill_buf().map_err(Error::Archive)? {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(Frames::new(blob)),
        _ => Box::new(blob),
    };
    let (plain, left) = Bounded::new(plain);
    let mut archive = Archive::new(plain);
    tree.begin_layer();
    let mut entries = archive.entries().map_err(Error::Archive)?;
    loop {
        left.set(MAX_HEADERS);
        let Some(entry) = entries.next() else { return Ok(()) };
        let mut entry = entry.map_err(Error::Archive)?;
        // The tree bounds the content.
        left.set(u64::MAX);
        apply_entry(tree, &mut entry)?;
        tree.skip(&mut entry)?;
    }
}

fn apply_entry<R: Read>(tree: &mut Tree, entry: &mut Entry<'_, R>) -> Result<(), Error> {
    let path = entry.path_bytes().into_owned();
    let complain = |why| Error::entry(&path, why);
    // First of all: where these cannot be read the name may be another one.
    let attributes = attributes(entry, &path)?;
    let mut names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    if path.contains(&0) || names.clone().any(|name| name == b"..") {
        return Err(complain("is no name in an image"));
    }
    let last = names.next_back().unwrap_or_default();
    let parent: Vec<u8> = names.flat_map(|name| [name, b"/"].concat()).collect();
    if last == OPAQUE {
        return tree.make_opaque(&parent);
    }
    if last.starts_with(AUFS) {
        return Ok(());
    }
    if let Some(name) = last.strip_prefix(WHITEOUT) {
        if matches!(name, b"" | b"." | b"..") {
            return Err(complain("takes away nothing that has a name"));
        }
        return tree.white_out(&[&parent, name].concat());
    }
    let kind = entry.header().entry_type();
    if kind == EntryType::Link {
        let target = entry.link_name_bytes().ok_or_else(|| complain("is a link to nothing"))?.into_owned();
        return tree.link(&path, &target);
    }
    let meta = meta(entry, &path, attributes)?;
    let kind = match kind {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let size = entry.size();
            let found = tree.add_file(&path, meta, entry)?;
            return if found == size { Ok(()) } else { Err(complain("is cut short")) };
        }
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => {
            let target = entry.link_name_bytes().ok_or_else(|| complain("is a link to nothing"))?;
            if target.is_empty() || target.len() >= 4096 || target.contains(&0) {
                return Err(complain("is a link to what is no path"));
            }
            Kind::Link(target.into_owned())
        }
        EntryType::Char => device("c", entry).ok_or_else(|| complain("has numbers that no device here can have"))?,
        EntryType::Block => device("b", entry).ok_or_else(|| complain("has numbers that no device here can have"))?,
        EntryType::Fifo => Kind::Fifo,
        EntryType::XGlobalHeader => return Ok(()),
        _ => return Err(complain("is of a kind that file systems do not have")),
    };
    tree.add(&path, kind, meta)
}

/// A device node. Linux has minor numbers up to 2²⁰, debugfs up to 2¹⁶.
fn device<R: Read>(letter: &'static str, entry: &Entry<'_, R>) -> Option<Kind> {
    let header = entry.header();
    let (major, minor) = (header.device_major().ok()??, header.device_minor().ok()??);
    (major < 1 << 12 && minor < 1 << 16).then_some(Kind::Device(letter, major, minor))
}

fn meta<R: Read>(entry: &Entry<'_, R>, path: &[u8], attributes: Attributes) -> Result<Meta, Error> {
    let header = entry.header();
    let id = |id: io::Result<u64>| {
        let id = u32::try_from(id.map_err(Error::Archive)?).ok().filter(|&id| id != u32::MAX);
        id.ok_or_else(|| Error::entry(path, "has an owner that Linux has no number for"))
    };
    Ok(Meta {
        permissions: header.mode().map_err(Error::Archive)? & 0o7777,
        owner: (id(header.uid())?, id(header.gid())?),
        time: header.mtime().map_err(Error::Archive)?,
        attributes,
    })
}

/// The extended attributes that mean something in a guest. The others belong to the machine the layer was made on.
fn attributes<R: Read>(entry: &mut Entry<'_, R>, path: &[u8]) -> Result<Attributes, Error> {
    let mut attributes = Attributes::new();
    for extension in entry.pax_extensions().map_err(Error::Archive)?.into_iter().flatten() {
        // The library takes a line break in a value for the value's end.
        let extension = extension.map_err(|_| Error::entry(path, "has extended headers that cannot be read"))?;
        if let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.")
            && (name == b"security.capability" || name.starts_with(b"user."))
        {
            if name.len() > MAX_ATTRIBUTE {
                return Err(Error::entry(path, "has an extended attribute with too long a name"));
            }
            attributes.push((name.to_vec(), extension.value_bytes().to_vec()));
        }
    }
    Ok(attributes)
}

/// The zstd frames of a blob, one after the other: some tools write many, and frames that are to be skipped.
struct Frames<R> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> Frames<R> {
    fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), in_frame: false }
    }

    /// Goes on to the next frame with content; false if there is none.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.in_frame {
                self.in_frame = self.next_frame()?;
                if !self.in_frame {
                    return Ok(0);
                }
            }
            if self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let some = BlockDecodingStrategy::UptoBytes(buffer.len());
                self.decoder.decode_blocks(&mut self.source, some).map_err(io::Error::other)?;
            }
            match self.decoder.read(buffer)? {
                0 if buffer.is_empty() => return Ok(0),
                0 if self.decoder.is_finished() => self.in_frame = false,
                0 => {}
                count => return Ok(count),
            }
        }
    }
}
