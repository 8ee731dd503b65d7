//! The image itself, by the programs of e2fsprogs: mke2fs fills it, debugfs puts right what mke2fs could not know.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Error, MIB};

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// Bytes of an inode.
const INODE: u64 = 256;
/// The longest line of a script. debugfs reads lines into a buffer of its libc's BUFSIZ, 1,024 bytes with some, and
/// what does not fit is the next command: with a `!` it would be one for the host's shell.
const MAX_LINE: usize = 1000;

/// How much an image has to hold.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    inodes: u64,
    blocks: u64,
}

impl Needs {
    /// Counts one file, directory or other name, with `size` bytes of content.
    pub fn add(&mut self, size: u64) {
        self.inodes += 1;
        // A directory takes a block, and so may the extents of a file.
        self.blocks = self.blocks.saturating_add(size.div_ceil(BLOCK)).saturating_add(1);
    }

    /// The size of an image with room for it, for the journal, and for some more. Unused blocks take no space: the
    /// image is a sparse file.
    pub fn size_mib(self) -> u64 {
        let bytes = self.blocks.saturating_mul(BLOCK).saturating_add(self.inodes() * INODE);
        (bytes / MIB).saturating_mul(9) / 8 + 64
    }

    fn inodes(self) -> u64 {
        self.inodes + self.inodes / 4 + 4096
    }
}

/// What is to be changed in an image so that nothing is as it was outside: a script for debugfs.
#[derive(Debug, Default)]
pub struct Corrections(Vec<u8>);

impl Corrections {
    /// Sets a field of `path`'s inode.
    pub fn set(&mut self, path: &[u8], field: &str, value: &str) -> Result<(), Error> {
        self.command("sif", &[path, field.as_bytes(), value.as_bytes()])
    }

    /// Sets type and permissions, as in `st_mode`.
    pub fn mode(&mut self, path: &[u8], mode: u32) -> Result<(), Error> {
        self.set(path, "mode", &format!("0{mode:o}"))
    }

    /// Sets the owner, where it is another than the one `found` outside.
    pub fn owner(&mut self, path: &[u8], (uid, gid): (u32, u32), found: (u32, u32)) -> Result<(), Error> {
        if uid != found.0 {
            self.set(path, "uid", &uid.to_string())?;
        }
        if gid != found.1 {
            self.set(path, "gid", &gid.to_string())?;
        }
        Ok(())
    }

    /// Makes a directory of root's.
    pub fn directory(&mut self, path: &[u8], permissions: u32) -> Result<(), Error> {
        self.command("mkdir", &[path])?;
        self.mode(path, 0o40_000 | permissions)
    }

    /// Makes an empty file of root's.
    pub fn empty_file(&mut self, path: &[u8], permissions: u32) -> Result<(), Error> {
        // Under a simple name: debugfs takes this one as it is.
        let (dir, name) = split(path);
        self.command("cd", &[dir])?;
        self.command("write", &[b"/dev/null", name])?;
        self.mode(path, 0o100_000 | permissions)?;
        self.owner(path, (0, 0), (u32::MAX, u32::MAX))
    }

    /// Makes a device node or a FIFO of root's; `what` is its letter, and its numbers if it is a device.
    pub fn node(&mut self, path: &[u8], what: &[&str]) -> Result<(), Error> {
        let (dir, name) = split(path);
        self.command("cd", &[dir])?;
        let words: Vec<_> = std::iter::once(name).chain(what.iter().map(|word| word.as_bytes())).collect();
        self.command("mknod", &words)
    }

    /// Sets an extended attribute to the content of a file.
    pub fn attribute(&mut self, path: &[u8], name: &[u8], value: &Path) -> Result<(), Error> {
        self.command("ea_set", &[b"-f", value.as_os_str().as_bytes(), path, name])
    }

    fn command(&mut self, name: &str, words: &[&[u8]]) -> Result<(), Error> {
        let start = self.0.len();
        self.0.extend_from_slice(name.as_bytes());
        for word in words {
            // Each of them ends a line.
            if word.iter().any(|byte| matches!(byte, b'\n' | b'\r' | b'\0')) {
                return Err(Error::entry(word, "has a line break in it, which debugfs cannot be told"));
            }
            self.0.extend_from_slice(b" \"");
            for &byte in *word {
                self.0.extend_from_slice(if byte == b'"' { b"\"\"" } else { std::slice::from_ref(&byte) });
            }
            self.0.push(b'"');
            if self.0.len() - start > MAX_LINE {
                return Err(Error::entry(word, "is longer than debugfs can be told"));
            }
        }
        self.0.push(b'\n');
        Ok(())
    }
}

/// The directory of an absolute path, and the name in it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(0) | None => (b"/", path.strip_prefix(b"/").unwrap_or(path)),
        Some(slash) => (&path[..slash], &path[slash + 1..]),
    }
}

/// Makes an ext4 file system of the files below `root`.
pub fn make(root: &Path, image: &Path, size_mib: u64, needs: Needs) -> Result<(), Error> {
    let inodes = needs.inodes().to_string();
    let size = format!("{size_mib}M");
    let options = ["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-I", "256", "-N", &inodes, "-d"];
    let words = options.iter().map(OsStr::new).chain([root.as_os_str(), image.as_os_str(), OsStr::new(&size)]);
    let (ok, said) = run("mke2fs", words)?;
    if ok { Ok(()) } else { Err(Error::Tool { tool: "mke2fs", size_mib, said }) }
}

/// Applies the corrections.
pub fn correct(image: &Path, size_mib: u64, corrections: Corrections) -> Result<(), Error> {
    let script = image.with_extension("debugfs");
    std::fs::write(&script, corrections.0).map_err(Error::io("write", &script))?;
    let words = [OsStr::new("-w"), OsStr::new("-f"), script.as_os_str(), image.as_os_str()];
    let (ok, said) = run("debugfs", words)?;
    // Its status does not tell whether a command failed. The first line it writes is its version.
    let (_version, complaints) = said.split_once('\n').unwrap_or_default();
    if ok && complaints.is_empty() {
        return Ok(());
    }
    let said = complaints.lines().take(5).collect::<Vec<_>>().join("; ");
    Err(Error::Tool { tool: "debugfs", size_mib, said })
}

/// Runs a tool; returns whether it succeeded, and its standard error.
fn run<'a>(tool: &'static str, words: impl IntoIterator<Item = &'a OsStr>) -> Result<(bool, String), Error> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new(tool);
    command.args(words).env("PATH", path).env("LC_ALL", "C");
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output();
    let output = output.map_err(|source: io::Error| Error::NoTool { tool, source })?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_debugfs_would_not_read_as_one_line_is_refused() {
        let mut corrections = Corrections::default();
        let long = [&b"/".repeat(900), &b" "[..], b"!id"].concat();
        corrections.mode(&long, 0o644).unwrap();
        assert!(corrections.0.split(|&byte| byte == b'\n').all(|line| line.len() <= MAX_LINE));
        for hostile in [&b"/a\n!id"[..], b"/a\r!id", b"/a\0!id", &b"/".repeat(1000), &b"\"".repeat(500)] {
            let tried = [
                corrections.mode(hostile, 0o644),
                corrections.directory(hostile, 0o755),
                corrections.empty_file(hostile, 0o644),
                corrections.node(hostile, &["p"]),
                corrections.attribute(b"/a", hostile, Path::new("value")),
            ];
            assert!(tried.iter().all(Result::is_err), "{tried:?}");
        }
    }
}
