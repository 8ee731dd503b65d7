//! `vesiclectl snapshot record`: which pages of a snapshot's memory a first run touches.
//!
//! The kernel knows: a page of the memory file that the microVM read is in its page tables, one that it wrote is a copy
//! there (Documentation/admin-guide/mm/pagemap.rst). With a page that is read the kernel maps those around it, which cost
//! a clone as little as they cost here.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;
use vesicle::machine::{State, read_state};
use vesicle::snapshot::draft::Draft;
use vesicle::snapshot::memory;
use vesicle::snapshot::pagemap::{Pagemap, Which};
use vesicle::snapshot::working_set::{self, MAX_RUNS, Run};
use vesiclectl::Vesicle;

use super::{about, shown};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A record to be made.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// The snapshot's state file.
    pub state: PathBuf,
    /// Its memory file.
    pub memory: PathBuf,
    /// Where the working set goes.
    pub output: PathBuf,
    /// Whose pages these are.
    pub of: Of,
}

/// Whose pages are noted.
#[derive(Debug, PartialEq, Eq)]
pub enum Of {
    /// Those of a microVM that was loaded already, and paused.
    Process(u32),
    /// Those of one that runs only for this.
    Run {
        /// The VMM.
        vesicle: PathBuf,
        /// It runs until this has ended; empty for `rest`.
        command: Vec<OsString>,
        /// It runs so long, without a command.
        rest: Duration,
    },
}

impl Record {
    /// Makes it; says how many bytes were touched, and how many of these written.
    ///
    /// # Errors
    /// What went wrong.
    pub fn run(&self) -> Result<(u64, u64)> {
        let (id, state) = read_state(&self.state)?;
        let size = state.ram_size();
        let file = File::open(&self.memory).map_err(about(&self.memory))?;
        memory::check(&file, size, Some(id)).map_err(about(&self.memory))?;
        let mut runs = match &self.of {
            Of::Process(process) => note(*process, &self.memory)?,
            Of::Run { vesicle, command, rest } => self.first_run(&state, vesicle, command, *rest)?,
        };
        if runs.len() > MAX_RUNS {
            runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.range.end - run.range.start));
            runs.truncate(MAX_RUNS);
            runs.sort_unstable_by_key(|run| run.range.start);
        }
        let fail = about(&self.output);
        let draft = Draft::create(&self.output).map_err(&fail)?;
        std::io::Write::write_all(&mut draft.file(), &working_set::encode(id, &runs)).map_err(&fail)?;
        draft.sync().map_err(&fail)?;
        draft.publish().map_err(&fail)?;
        let bytes = |wanted: fn(&Run) -> bool| {
            runs.iter().filter(|run| wanted(run)).map(|run| run.range.end - run.range.start).sum()
        };
        Ok((bytes(|_| true), bytes(|run| run.written)))
    }

    /// Loads the snapshot into a VMM of its own, lets it run, and looks. Nothing it writes to a drive stays.
    fn first_run(&self, state: &State, vesicle: &Path, command: &[OsString], rest: Duration) -> Result<Vec<Run>> {
        let dir = vesiclectl::scratch::directory("vesiclectl-", &std::env::temp_dir())?;
        let vsock = dir.path().join("v.sock");
        let written = state.config().drives.iter().filter(|drive| !drive.is_read_only);
        let overlays: Vec<_> = written.map(|drive| json!({ "drive_id": drive.drive_id, "overlay": {} })).collect();
        let mut load = json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "drive_overrides": overlays,
            "resume_vm": true,
        });
        if state.config().vsock.is_some() {
            load["vsock_override"] = json!({ "uds_path": vsock });
        }
        let mut vmm = Command::new(vesicle);
        vmm.stdin(Stdio::null()).stdout(Stdio::null());
        let mut vmm = Vesicle::spawn(vmm).map_err(about(vesicle))?;
        vmm.api().must_put("/snapshot/load", &load)?;
        if let Some((program, arguments)) = command.split_first() {
            let mut command = Command::new(program);
            command.args(arguments).env("VESICLE_VSOCK", &vsock).env("VESICLE_API", vmm.api().socket());
            let status = command.status().map_err(about(Path::new(program)))?;
            if !status.success() {
                return Err(format!("{}: {status}", shown(Path::new(program))).into());
            }
        } else if let Some(status) = vmm.wait_timeout(rest)? {
            return Err(format!("the microVM ended before it was looked at: {status}").into());
        }
        let reply = vmm.api().patch("/vm", &json!({ "state": "Paused" }))?;
        if reply.status != 204 {
            return Err(reply.fault().into());
        }
        note(vmm.child().id(), &self.memory)
    }
}

/// The pages of the memory file that process `id` has touched.
fn note(id: u32, memory: &Path) -> Result<Vec<Run>> {
    let proc = PathBuf::from(format!("/proc/{id}"));
    let maps = fs::read_to_string(proc.join("maps")).map_err(about(&proc))?;
    let dir = File::open(&proc).map_err(about(&proc))?;
    let pagemap = Pagemap::open(Some(dir.as_fd())).map_err(about(&proc))?;
    let (inode, path) = (fs::metadata(memory)?.ino(), fs::canonicalize(memory)?);
    let mut mappings: Vec<_> = maps.lines().filter_map(|line| mapping(line, inode, &path)).collect();
    if mappings.is_empty() {
        return Err(format!("process {id} has no memory from {}", shown(memory)).into());
    }
    mappings.sort_unstable_by_key(|mapping| mapping.offset);
    let mut runs = Vec::new();
    for Mapping { host, size, offset } in mappings {
        let look = |which| {
            let mut found = Vec::new();
            let take = |run: Range<u64>| {
                found.push(offset + run.start..offset + run.end);
                Ok(())
            };
            pagemap.runs((host, size), which, &[], take).map(|()| found)
        };
        runs.extend(split(&look(Which::Touched)?, &look(Which::Private)?));
    }
    Ok(runs)
}

/// A piece of guest RAM.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    host: u64,
    size: u64,
    /// In the memory file.
    offset: u64,
}

/// What a line of /proc/PID/maps says, if it is guest RAM: a private mapping of the memory file.
fn mapping(line: &str, inode: u64, path: &Path) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let (start, end, flags, offset) = (number(start)?, number(end)?, words.next()?, number(words.next()?)?);
    let theirs: u64 = words.nth(1)?.parse().ok()?;
    // File systems that show other inode numbers here show the path all the same.
    let same = theirs == inode || words.next().is_some_and(|name| Path::new(name.trim_start()) == path);
    (flags == "rw-p" && same).then_some(Mapping { host: start, size: end.checked_sub(start)?, offset })
}

/// What was touched, by whether it was written; both ascend.
fn split(touched: &[Range<u64>], written: &[Range<u64>]) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut push = |range: Range<u64>, written| {
        if !range.is_empty() {
            runs.push(Run { range, written });
        }
    };
    let (mut written, mut at) = (written.iter().peekable(), 0);
    for range in touched {
        at = range.start.max(at);
        while let Some(write) = written.next_if(|write| write.start < range.end) {
            push(at..write.start, false);
            push(write.start.max(at)..write.end, true);
            at = write.end.max(at);
        }
        push(at..range.end, false);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_were_written_are_told_from_those_that_were_read() {
        let run = |range: Range<u64>, written| Run { range, written };
        assert_eq!(split(&[], &[]), []);
        assert_eq!(
            split(&[0..10, 20..30, 40..50], &[0..2, 4..5, 28..30, 40..50]),
            [
                run(0..2, true),
                run(2..4, false),
                run(4..5, true),
                run(5..10, false),
                run(20..28, false),
                run(28..30, true),
                run(40..50, true)
            ]
        );
    }

    #[test]
    fn guest_ram_is_the_private_mapping_of_the_memory_file() {
        let path = Path::new("/tmp/a snapshot/memory");
        let line = |flags: &str, rest: &str| format!("7f00-7f40 {flags} 00001000 00:2a {rest}");
        let found = Some(Mapping { host: 0x7f00, size: 0x40, offset: 0x1000 });
        for (line, expected) in [
            (line("rw-p", "77    /elsewhere"), &found),
            (line("rw-p", "5    /tmp/a snapshot/memory"), &found),
            (line("r--s", "77    /tmp/a snapshot/memory"), &None),
            (line("rw-p", "5    /tmp/other"), &None),
            ("7f00-7f40 rw-p 00000000 00:00 0 ".to_owned(), &None),
            ("nonsense".to_owned(), &None),
        ] {
            assert_eq!(mapping(&line, 77, path), *expected, "{line}");
        }
    }
}
