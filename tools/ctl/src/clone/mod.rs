//! `vesiclectl clone`: many microVMs from one snapshot, each answering on a vsock of its own.
//!
//! The guest sends a line to whoever connects, with random numbers in it: two that are alike would show that clones
//! share what they must not.

mod memory;
mod plot;

use std::collections::HashSet;
use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::num::NonZero;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use lexopt::{Arg, Parser, ValueExt};
use serde_json::json;
use vesiclectl::{BOOT_ARGS, Job, Script, Vesicle};

use crate::bench::{Api, Subject, dial};
use crate::http::Http;
use memory::{Cgroup, Memory};
use plot::Series;

/// What `vesiclectl clone --help` prints.
pub const HELP: &str = "\
Runs many microVMs from one snapshot, and says how fast they came and what they cost.

Usage: vesiclectl clone --vesicle FILE --kernel FILE --initramfs FILE --program FILE [OPTION]... N
       vesiclectl clone --vesicle FILE --snapshot STATE MEMORY [OPTION]... N

  --vesicle FILE            the VMM to run
  --kernel FILE             boot this kernel, an ELF vmlinux or a bzImage, to make the snapshot of
  --initramfs FILE          the default guest's
  --program FILE            what answers in the guest: tools/guest vsock prints its path
  --memory MIB              its memory [default: 128]
  --snapshot STATE MEMORY   clone this one, whose guest sends a random line to whoever connects
  --port PORT               the guest's vsock port [default: 5000]
  --at-once N               how many are started at a time [default: one for each processor]
  --plot FILE               draw how long they took, as SVG

When all have answered, their memory is measured, one of them is killed, and the others are asked again. The exit status
is 0 if all answered, and no line came twice.
";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Nothing takes so long unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// The guest comes to rest before it is saved, and clones before their memory is measured.
const REST: Duration = Duration::from_millis(500);

/// What the clones are made of.
#[derive(Debug, PartialEq, Eq)]
enum Origin {
    Boot { kernel: PathBuf, initramfs: PathBuf, program: PathBuf },
    Snapshot(Files),
}

/// The files of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Files {
    state: PathBuf,
    memory: PathBuf,
}

/// Clones to be.
#[derive(Debug, PartialEq, Eq)]
pub struct Herd {
    vesicle: PathBuf,
    origin: Origin,
    memory: u64,
    port: u32,
    at_once: usize,
    plot: Option<PathBuf>,
    count: usize,
}

/// One that has answered.
struct Clone {
    vesicle: Vesicle,
    vsock: PathBuf,
    line: String,
    times: Times,
}

/// How long it took.
#[derive(Debug, Clone, Copy)]
struct Times {
    api: Duration,
    load: Duration,
    answer: Duration,
}

impl Herd {
    /// Takes the arguments that follow `clone`; `None` if they ask for help.
    ///
    /// # Errors
    /// An argument that is unknown, missing or malformed.
    pub fn parse(parser: &mut Parser) -> std::result::Result<Option<Self>, lexopt::Error> {
        let [mut vesicle, mut kernel, mut initramfs, mut program, mut plot] = [const { None::<PathBuf> }; 5];
        let (mut snapshot, mut count, mut at_once, mut memory, mut port) = (None, None, None, 128, 5000);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("vesicle") => vesicle = Some(parser.value()?.into()),
                Arg::Long("kernel") => kernel = Some(parser.value()?.into()),
                Arg::Long("initramfs") => initramfs = Some(parser.value()?.into()),
                Arg::Long("program") => program = Some(parser.value()?.into()),
                Arg::Long("snapshot") => {
                    snapshot = Some(Files { state: parser.value()?.into(), memory: parser.value()?.into() });
                }
                Arg::Long("memory") => memory = parser.value()?.parse()?,
                Arg::Long("port") => port = parser.value()?.parse()?,
                Arg::Long("at-once") => at_once = Some(parser.value()?.parse::<NonZero<usize>>()?),
                Arg::Long("plot") => plot = Some(parser.value()?.into()),
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                Arg::Value(value) if count.is_none() => count = Some(value.parse::<NonZero<usize>>()?),
                other => return Err(other.unexpected()),
            }
        }
        let origin = match (snapshot, kernel, initramfs, program) {
            (Some(files), None, None, None) => Origin::Snapshot(files),
            (None, Some(kernel), Some(initramfs), Some(program)) => Origin::Boot { kernel, initramfs, program },
            _ => return Err("name a --snapshot, or --kernel, --initramfs and --program to make one".into()),
        };
        let at_once = at_once.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZero::get);
        Ok(Some(Self {
            vesicle: vesicle.ok_or("--vesicle is missing")?,
            origin,
            memory,
            port,
            at_once,
            plot,
            count: count.ok_or("say how many clones")?.get(),
        }))
    }

    /// Makes them, measures them and asks them again.
    ///
    /// # Errors
    /// One did not come, or did not answer, or drew what another drew.
    pub fn run(&self) -> Result<()> {
        let dir = vesiclectl::scratch::directory("vesicle-clone-", &std::env::temp_dir())?;
        let files = match &self.origin {
            Origin::Snapshot(files) => files.clone(),
            Origin::Boot { kernel, initramfs, program } => {
                self.make_snapshot(dir.path(), kernel, initramfs, program)?
            }
        };
        let cgroup = Cgroup::new();
        let (hold, next) = (Mutex::new(()), AtomicUsize::new(0));
        let (sender, clones) = mpsc::channel();
        std::thread::scope(|scope| {
            // A VMM ends with the thread that started it: the threads stay until all is over.
            let held = hold.lock().unwrap_or_else(PoisonError::into_inner);
            let begin = Instant::now();
            for _ in 0..self.at_once.min(self.count) {
                let sender = sender.clone();
                let (files, dir, cgroup, hold, next) = (&files, dir.path(), cgroup.as_ref(), &hold, &next);
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= self.count {
                            break;
                        }
                        let clone = self.start(index, files, dir, cgroup);
                        if sender.send(clone.map_err(|error| format!("clone {index}: {error}"))).is_err() {
                            break;
                        }
                    }
                    drop(sender);
                    drop(hold.lock());
                });
            }
            drop(sender);
            let clones: std::result::Result<Vec<_>, String> = clones.iter().collect();
            let took = begin.elapsed();
            let outcome = clones.map_err(Into::into).and_then(|clones| self.examine(clones, took, cgroup.as_ref()));
            next.store(self.count, Ordering::Relaxed);
            drop(held);
            outcome
        })
    }

    /// Boots the default guest up to where it listens, and saves it.
    fn make_snapshot(&self, dir: &Path, kernel: &Path, initramfs: &Path, program: &Path) -> Result<Files> {
        let files = Files { state: dir.join("state"), memory: dir.join("memory") };
        let script =
            format!("cat /dev/vda >/run/vsock && chmod +x /run/vsock && exec /run/vsock serve {} random\n", self.port);
        let job = Job::create(dir.join("job"), Script::from(script.as_str()))?;
        // It writes to where nothing is configured, and must be told of all else then as well.
        let paths = [Some(dir), kernel.parent(), initramfs.parent(), program.parent()];
        let allowed: Vec<_> = paths.into_iter().flatten().map(allowed_path).collect();
        let allowed: Vec<_> = allowed.iter().map(String::as_str).collect();
        let pause = || std::thread::sleep(Duration::from_millis(1));
        let mut api = Api::start(&Subject::new(&self.vesicle), &dir.join("api.sock"), &allowed, pause)?;
        let boot_source = json!({ "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": BOOT_ARGS });
        let drive = |id: &str, path: &Path| json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": true });
        api.must("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": self.memory }))?;
        api.must("PUT", "/boot-source", &boot_source)?;
        api.must("PUT", "/drives/program", &drive("program", program))?;
        api.must("PUT", "/drives/job", &drive("job", job.path()))?;
        api.must("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": dir.join("origin.sock") }))?;
        api.must("PUT", "/actions", &json!({ "action_type": "InstanceStart" }))?;
        api.process.await_output("listening")?;
        std::thread::sleep(REST);
        api.must("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let request = json!({ "snapshot_path": files.state, "mem_file_path": files.memory });
        let took = api.must("PUT", "/snapshot/create", &request)?;
        println!("saved a microVM of {} MiB in {:.1} ms", self.memory, took.as_secs_f64() * 1e3);
        Ok(files)
    }

    fn start(&self, index: usize, files: &Files, dir: &Path, cgroup: Option<&Cgroup>) -> Result<Clone> {
        let vsock = dir.join(format!("clone{index}.sock"));
        let mut command = Command::new(&self.vesicle);
        let log = File::options().create(true).append(true).open(dir.join("log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let begin = Instant::now();
        let mut vesicle = Vesicle::spawn(command)?;
        if let Some(cgroup) = cgroup {
            cgroup.add(vesicle.child().id())?;
        }
        let stream = UnixStream::connect(vesicle.api().socket())?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut http = Http::new(stream);
        http.request("GET", "/", "")?;
        let api = begin.elapsed();
        let request = json!({
            "snapshot_path": files.state,
            "mem_backend": { "backend_type": "File", "backend_path": files.memory },
            "vsock_override": { "uds_path": vsock },
            "resume_vm": true,
        });
        let begin = Instant::now();
        let load = http.must("PUT", "/snapshot/load", &request)?;
        let line = ask(&vsock, self.port)?;
        Ok(Clone { vesicle, vsock, line, times: Times { api, load, answer: begin.elapsed() } })
    }

    /// Says what there is to say, and kills one clone.
    fn examine(&self, mut clones: Vec<Clone>, took: Duration, cgroup: Option<&Cgroup>) -> Result<()> {
        let ms =
            |what: fn(&Times) -> Duration| clones.iter().map(|clone| what(&clone.times).as_secs_f64() * 1e3).collect();
        let series = [
            Series::new("process start → API", ms(|times| times.api)),
            Series::new("load → reply", ms(|times| times.load)),
            Series::new("load → answer over vsock", ms(|times| times.answer)),
        ];
        let rate = clones.len() as f64 / took.as_secs_f64();
        println!("{} clones, {} at a time: {rate:.1} a second\n\n{}", clones.len(), self.at_once, plot::text(&series));
        if let Some(path) = &self.plot {
            fs::write(path, plot::svg(&series))?;
        }
        std::thread::sleep(REST);
        let memory: Vec<_> = clones
            .iter_mut()
            .map(|clone| Memory::of(clone.vesicle.child().id()))
            .collect::<std::result::Result<_, _>>()?;
        let median = |what: fn(&Memory) -> u64| {
            let mut values: Vec<_> = memory.iter().map(what).collect();
            values.sort_unstable();
            mib(values[values.len() / 2])
        };
        print!(
            "memory per clone: {} MiB its own, {} MiB with its share",
            median(|m| m.own),
            median(|m| m.proportional)
        );
        match cgroup.and_then(Cgroup::current) {
            Some(all) => println!(", {} MiB with the kernel's part (cgroup)", mib(all / clones.len() as u64)),
            None => println!(),
        }
        let mut lines: HashSet<String> = HashSet::new();
        let mut note = |index: usize, line: String| -> Result<()> {
            if lines.insert(line.clone()) {
                Ok(())
            } else {
                Err(format!("clone {index} drew what was drawn before: {line}").into())
            }
        };
        for (index, clone) in clones.iter_mut().enumerate() {
            note(index, std::mem::take(&mut clone.line))?;
        }
        drop(clones.swap_remove(clones.len() / 2));
        for (index, clone) in clones.iter().enumerate() {
            note(
                index,
                ask(&clone.vsock, self.port)
                    .map_err(|error| format!("after one was killed, clone {index}: {error}"))?,
            )?;
        }
        println!("each drew its own random numbers; one was killed, and {} others answered again", clones.len());
        Ok(())
    }
}

fn allowed_path(path: &Path) -> String {
    format!("--allow-path={}", Path::new(".").join(path).canonicalize().as_deref().unwrap_or(path).display())
}

fn mib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1_048_576.0)
}

/// The line that the guest sends to a new connection.
fn ask(vsock: &Path, port: u32) -> Result<String> {
    let mut line = String::new();
    BufReader::new(dial(vsock, port)?).read_line(&mut line)?;
    if line.ends_with('\n') {
        Ok(line.trim_end().to_owned())
    } else {
        Err("the guest hung up without an answer".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> std::result::Result<Option<Herd>, String> {
        Herd::parse(&mut Parser::from_args(line.split_whitespace())).map_err(|error| error.to_string())
    }

    #[test]
    fn clones_are_of_a_snapshot_or_of_a_guest_that_is_booted_for_them() {
        let herd = parsed("--vesicle v --snapshot s m --at-once 3 8").unwrap().unwrap();
        let files = Files { state: "s".into(), memory: "m".into() };
        assert_eq!((herd.count, herd.at_once, herd.origin), (8, 3, Origin::Snapshot(files)));
        let herd = parsed("8 --vesicle v --kernel k --initramfs i --program p --plot x.svg").unwrap().unwrap();
        assert!(matches!(herd.origin, Origin::Boot { .. }) && herd.plot == Some("x.svg".into()));
        assert_eq!(parsed("--help"), Ok(None));
        for wrong in [
            "--vesicle v --kernel k 3",
            "--vesicle v --snapshot s m",
            "--vesicle v --snapshot s m 0",
            "--vesicle v --snapshot s m 1 2",
            "--snapshot s m 1",
            "--vesicle v --snapshot s m --kernel k --initramfs i --program p 1",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
