//! An OCI image layout: the documents that lead to an image's layers, and the blobs, each checked against its digest.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::digest::DynDigest;
use sha2::{Digest as _, Sha256, Sha512};
use tar::Archive;

use super::Error;
use super::layer::{Bounded, MAX_HEADERS};

/// The longest document that is read, in bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most layers of an image, and most files of a layout.
const MAX_LAYERS: usize = 1000;
const MAX_MEMBERS: usize = 100_000;
/// How many indices may lead to each other.
const MAX_INDICES: usize = 4;

/// What names a blob: an algorithm and a sum in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    algorithm: Algorithm,
    sum: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Digest {
    /// Takes `sha256:…` or `sha512:…`, as a descriptor has it.
    fn parse(text: &str) -> Option<Self> {
        let (algorithm, sum) = match text.split_once(':')? {
            ("sha256", sum) if sum.len() == 64 => (Algorithm::Sha256, sum),
            ("sha512", sum) if sum.len() == 128 => (Algorithm::Sha512, sum),
            _ => return None,
        };
        let digits = sum.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        digits.then(|| Self { algorithm, sum: sum.to_owned() })
    }

    fn name(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    fn hasher(&self) -> Box<dyn DynDigest> {
        match self.algorithm {
            Algorithm::Sha256 => Box::new(Sha256::new()),
            Algorithm::Sha512 => Box::new(Sha512::new()),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name(), self.sum)
    }
}

/// A layout.
#[derive(Debug)]
pub enum Layout {
    /// In a directory.
    Directory(PathBuf),
    /// In a tar archive: where its files begin, and their lengths.
    Archive(File, HashMap<Vec<u8>, (u64, u64)>),
}

impl Layout {
    /// Opens the layout at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let file = open(path).map_err(Error::io("read", path))?;
        let members = members(&file)?;
        Ok(Self::Archive(file, members))
    }

    /// The layers of the image that `reference` names, or of the only one; the lowest comes first.
    pub fn layers(&self, reference: Option<&str>) -> Result<Vec<Digest>, Error> {
        let missing = || Error::Layout("there is no index.json, so this is no OCI image layout".into());
        let (mut index, length) = self.member("index.json")?.ok_or_else(missing)?;
        let mut document = parse("index.json", &read_document(&mut index, "index.json", length)?)?;
        let mut reference = reference;
        for _ in 0..=MAX_INDICES {
            let Some(manifests) = document["manifests"].as_array() else {
                return layers_of(&document);
            };
            let digest = choose(manifests, reference.take())?;
            document = self.document(&digest)?;
        }
        Err(Error::Layout(format!("more than {MAX_INDICES} indices lead to each other")))
    }

    /// Lets `apply` read a layer, all of which must be what its digest says.
    pub fn read_layer(
        &self,
        digest: &Digest,
        apply: impl FnOnce(&mut dyn Read) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut blob = self.blob(digest)?;
        let applied = apply(&mut blob);
        // Damage explains whatever else went wrong.
        blob.finish(digest)?;
        applied
    }

    fn document(&self, digest: &Digest) -> Result<Value, Error> {
        let mut blob = self.blob(digest)?;
        let length = blob.length;
        let text = read_document(&mut blob, &digest.to_string(), length)?;
        blob.finish(digest)?;
        parse(&digest.to_string(), &text)
    }

    fn blob(&self, digest: &Digest) -> Result<Blob<'_>, Error> {
        let name = format!("blobs/{}/{}", digest.name(), digest.sum);
        let found = self.member(&name)?;
        let (reader, length) = found.ok_or_else(|| Error::Layout(format!("the blob {digest} is missing")))?;
        Ok(Blob { reader, hasher: digest.hasher(), length })
    }

    /// A file of the layout and its length.
    fn member(&self, name: &str) -> Result<Option<Member<'_>>, Error> {
        match self {
            Self::Directory(dir) => {
                let path = dir.join(name);
                match open(&path) {
                    Ok(file) => {
                        let length = file.metadata().map_err(Error::io("read", &path))?.len();
                        Ok(Some((Box::new(file), length)))
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(Error::io("read", &path)(error)),
                }
            }
            Self::Archive(file, members) => Ok(members.get(name.as_bytes()).map(|&(start, length)| {
                (Box::new(Part { file, at: start, left: length }) as Box<dyn Read + '_>, length)
            })),
        }
    }
}

/// A file of a layout, and its length.
type Member<'a> = (Box<dyn Read + 'a>, u64);

/// The files in an archive: where they begin, and their lengths.
fn members(file: &File) -> Result<HashMap<Vec<u8>, (u64, u64)>, Error> {
    let (reader, left) = Bounded::new(BufReader::new(file));
    let mut archive = Archive::new(reader);
    let mut members = HashMap::new();
    let mut entries = archive.entries_with_seek().map_err(Error::Archive)?;
    loop {
        left.set(MAX_HEADERS);
        let Some(entry) = entries.next() else { return Ok(members) };
        let entry = entry.map_err(Error::Archive)?;
        if entry.header().entry_type().is_file() {
            let name = entry.path_bytes();
            let name = name.strip_prefix(b"./").unwrap_or(&name).to_vec();
            members.insert(name, (entry.raw_file_position(), entry.size()));
        }
        if members.len() > MAX_MEMBERS {
            return Err(Error::Bomb { limit: MAX_MEMBERS as u64, what: "files" });
        }
    }
}

/// Opens a regular file; anything else could block.
fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

/// A part of a file.
struct Part<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// A blob, summed up as it is read.
struct Blob<'a> {
    reader: Box<dyn Read + 'a>,
    hasher: Box<dyn DynDigest>,
    length: u64,
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

impl Blob<'_> {
    /// Reads what is left, and compares.
    fn finish(mut self, digest: &Digest) -> Result<(), Error> {
        io::copy(&mut self, &mut io::sink()).map_err(Error::Archive)?;
        let sum: String = self.hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if sum == digest.sum {
            return Ok(());
        }
        Err(Error::Damaged { digest: digest.to_string(), found: format!("the sum {sum}") })
    }
}

fn read_document(reader: &mut dyn Read, name: &str, length: u64) -> Result<Vec<u8>, Error> {
    if length > MAX_DOCUMENT {
        return Err(Error::Layout(format!("{name} is {length} bytes long, which is too long for a document")));
    }
    let mut text = Vec::new();
    reader.take(MAX_DOCUMENT).read_to_end(&mut text).map_err(Error::Archive)?;
    Ok(text)
}

fn parse(name: &str, text: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(text).map_err(|error| Error::Layout(format!("{name} is no JSON document: {error}")))
}

/// The digest in a descriptor.
fn digest(descriptor: &Value) -> Result<Digest, Error> {
    let text = descriptor["digest"].as_str().unwrap_or_default();
    Digest::parse(text).ok_or_else(|| Error::Layout(format!("{text:?} is no digest of sha256 or sha512")))
}

/// The image for this machine among the manifests of an index, or the one of the name asked for.
fn choose(manifests: &[Value], reference: Option<&str>) -> Result<Digest, Error> {
    let name = |manifest: &Value| {
        manifest["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap_or("without a name").to_owned()
    };
    let fits = |manifest: &&Value| {
        let platform = &manifest["platform"];
        let named = reference.is_none_or(|reference| name(manifest) == reference);
        named && (platform.is_null() || platform["os"] == "linux" && platform["architecture"] == "amd64")
    };
    let fitting: Vec<_> = manifests.iter().filter(fits).collect();
    match fitting[..] {
        [manifest] => digest(manifest),
        [] => Err(Error::Layout(match reference {
            Some(reference) => format!("there is no image {reference:?} for linux/amd64"),
            None => "there is no image for linux/amd64".into(),
        })),
        _ => {
            let names: Vec<_> = fitting.iter().map(|manifest| name(manifest)).collect();
            Err(Error::Layout(format!("name one of several images with --ref: {}", names.join(", "))))
        }
    }
}

/// The layers in an image's manifest.
fn layers_of(manifest: &Value) -> Result<Vec<Digest>, Error> {
    let layers = manifest["layers"].as_array().ok_or_else(|| Error::Layout("the manifest has no layers".into()))?;
    if layers.len() > MAX_LAYERS {
        return Err(Error::Layout(format!("the image has {} layers, more than {MAX_LAYERS}", layers.len())));
    }
    layers.iter().map(digest).collect()
}
