//! The job drive: how the default guest gets its command and gives back an exit status.
//!
//! `resources/guest/init` has the other side of this protocol, and its layout. A job's standard input, if it has one,
//! begins at [`INPUT`], behind everything that init reads.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Kernel arguments of the default guest: a quiet kernel that resets the machine when it panics, with its console on the
/// serial port. The last line leaves out what takes Debian's kernel a third of its boot and a guest of one command has no
/// use for: tests of ciphers, a random number generator for FIPS mode, the checks and names behind files of tracing, and the
/// rewriting of its text for a single processor.
pub const BOOT_ARGS: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 \
    i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce \
    cryptomgr.notests initcall_blacklist=jent_mod_init,ftrace_check_for_weak_functions,trace_eval_init noreplace-smp";

const MAGIC: &[u8; 8] = b"VSCLJOB1";
/// Of a drive without a job, for which the guest waits.
const NO_JOB: &[u8; 8] = b"VSCLWAIT";
const STATUS: u64 = 512;
const SECTOR: u64 = 512;
const SCRIPT: u64 = 4096;
const INPUT: u64 = 1 << 20;
/// The script ends with a NUL before the input begins.
const MAX_SCRIPT: usize = (INPUT - SCRIPT) as usize - 1;

/// `word` as a literal of any POSIX shell.
pub fn quote(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            _ => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// A shell script for the guest, put together line by line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Script(Vec<u8>);

impl Script {
    /// A script without lines.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a line of shell.
    #[must_use]
    pub fn line(mut self, line: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(line.as_ref());
        self.0.push(b'\n');
        self
    }

    /// Becomes the command `argv`, whose words the shell takes as they are. `before` precedes it on its line.
    #[must_use]
    pub fn exec<S: AsRef<OsStr>>(mut self, before: &str, argv: &[S]) -> Self {
        self.0.extend_from_slice(before.as_bytes());
        self.0.extend_from_slice(b"exec");
        for word in argv {
            self.0.push(b' ');
            self.0.extend_from_slice(&quote(word.as_ref()));
        }
        self.0.push(b'\n');
        self
    }
}

impl From<&str> for Script {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

/// A job drive.
#[derive(Debug)]
pub struct Job {
    path: PathBuf,
}

impl Job {
    /// What the guest writes to its serial port when it begins to wait for a job: an ASCII record separator.
    pub const WAITS: u8 = 0x1e;

    /// Makes a drive's image without a job at `path`, a new file: its guest says that it [waits](Self::WAITS).
    ///
    /// # Errors
    /// If the file exists or cannot be written.
    pub fn none(path: &Path) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all_at(NO_JOB, 0)?;
        file.set_len(INPUT)
    }

    /// Makes the drive's image at `path`, a new file.
    ///
    /// # Errors
    /// If the file exists or cannot be written, or the script is longer than a job drive can hold.
    pub fn create(path: impl Into<PathBuf>, script: Script) -> io::Result<Self> {
        Self::write(path.into(), &mut io::empty(), |_| script)
    }

    /// Makes the drive's image at `path`, a new file, for a command that reads `input`, all of which is copied. `device`
    /// is what the guest calls the drive, such as `/dev/vda`.
    ///
    /// # Errors
    /// As [`Job::create`], and if `input` cannot be read.
    pub fn with_input<S: AsRef<OsStr>>(
        path: impl Into<PathBuf>,
        argv: &[S],
        device: &str,
        input: &mut impl Read,
    ) -> io::Result<Self> {
        Self::write(path.into(), input, |length| {
            let feed = format!("dd if={device} bs={INPUT} skip=1 2>/dev/null | head -c {length} | ");
            Script::new().exec(&feed, argv)
        })
    }

    fn write(path: PathBuf, input: &mut impl Read, script: impl FnOnce(u64) -> Script) -> io::Result<Self> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        file.seek(SeekFrom::Start(INPUT))?;
        let length = io::copy(input, &mut file)?;
        let Script(script) = script(length);
        if script.len() > MAX_SCRIPT {
            let message = format!("the job is {} bytes long; a job drive holds {MAX_SCRIPT}", script.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        file.write_all_at(MAGIC, 0)?;
        file.write_all_at(&script, SCRIPT)?;
        file.set_len((INPUT + length).next_multiple_of(SECTOR))?;
        Ok(Self { path })
    }

    /// The image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The exit status that the guest left, or `None` if it never came so far.
    ///
    /// # Errors
    /// If the image cannot be read.
    pub fn status(&self) -> io::Result<Option<u8>> {
        let mut sector = [0; SECTOR as usize];
        File::open(&self.path)?.read_exact_at(&mut sector, STATUS)?;
        let line = sector.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let status = line.strip_prefix(b"exit ").and_then(|digits| std::str::from_utf8(digits).ok());
        Ok(status.and_then(|digits| digits.parse().ok()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::ffi::OsStringExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// What the host's own shell makes of `script`.
    fn run(script: &[u8]) -> Vec<u8> {
        let mut shell = Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        shell.stdin.take().unwrap().write_all(script).unwrap();
        shell.wait_with_output().unwrap().stdout
    }

    #[test]
    fn every_word_of_a_command_reaches_it_as_it_was_given() {
        let words = ["", " ", "it's", "''", "a\nb", "$HOME `id` $(id)", "*", "two\nlines", "\"", "-n", "!", "\\"];
        let mut argv: Vec<_> = ["printf", "%s|"].iter().chain(&words).map(std::ffi::OsString::from).collect();
        argv.push(std::ffi::OsString::from_vec(vec![b'\xff', b'\'', b'\xfe']));
        let Script(script) = Script::new().line("true").exec("", &argv);
        let mut expected = words.join("|").into_bytes();
        expected.extend_from_slice(b"|\xff'\xfe|");
        assert_eq!(run(&script), expected);
    }

    #[test]
    fn a_job_has_no_status_until_the_guest_leaves_one() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::create(dir.path().join("job"), Script::from("true\n")).unwrap();
        let image = std::fs::read(job.path()).unwrap();
        assert_eq!((&image[..8], &image[4096..4102]), (&b"VSCLJOB1"[..], &b"true\n\0"[..]));
        assert_eq!(image.len() % 512, 0);
        assert_eq!(job.status().unwrap(), None);

        let file = OpenOptions::new().write(true).open(job.path()).unwrap();
        for (line, status) in
            [("exit 137\n", Some(137)), ("exit 256\n", None), ("exit \n", None), ("exit 0\n", Some(0))]
        {
            file.write_all_at(&[0; 512], 512).unwrap();
            file.write_all_at(line.as_bytes(), 512).unwrap();
            assert_eq!(job.status().unwrap(), status, "{line:?}");
        }
    }

    #[test]
    fn input_is_read_back_whole_through_the_drive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job");
        let input: Vec<u8> = (0..3_000_001u32).map(|n| n.to_le_bytes()[(n % 4) as usize]).collect();
        let job = Job::with_input(&path, &["cat"], path.to_str().unwrap(), &mut &input[..]).unwrap();
        let image = std::fs::read(job.path()).unwrap();
        let script: Vec<u8> = image[SCRIPT as usize..INPUT as usize].iter().copied().take_while(|&b| b != 0).collect();
        assert!(run(&script) == input);
    }

    #[test]
    fn a_job_that_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Job::create(dir.path().join("job"), Script::new().line("x".repeat(1 << 20))).unwrap_err();
        assert!(error.to_string().starts_with("the job is 1048577 bytes long"), "{error}");
    }
}
