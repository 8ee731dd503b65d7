//! How each figure is measured.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::counters::{Counters, Counts};
use super::figures::Part;
use super::guest::{FLAT_DIRTY, Files, Job, MEMORY_MIB};
use super::process;
use super::snapshot;
use super::subject::{Api, Process, Subject};
use super::tap::{self, Host};
use super::{jail, limits, together, vsock};

/// Values of figures, in base units.
pub type Values = Vec<(&'static str, f64)>;
/// What a measurement brings.
pub type Outcome = Result<Values, Box<dyn Error>>;

/// Requests of the random and the sequential block figures: of those that are short so many that what happens once, such
/// as the first use of the second half of a ring, weighs little.
const RANDOM: u32 = 2000;
const SEQUENTIAL: u32 = 64;
/// MiB over TCP, and round trips.
const STREAM: u32 = 64;
const ROUND_TRIPS: u32 = 2000;

/// A measurement.
#[derive(Debug)]
pub struct Experiment {
    /// The figures it yields.
    pub figures: &'static [&'static str],
    /// Whether QEMU, which has another API, takes part.
    pub for_qemu: bool,
    /// Whether a repetition could yield something else.
    pub repeats: bool,
    /// Measures once.
    pub run: fn(&Bench, &Subject) -> Outcome,
}

/// One that is repeated.
pub const fn experiment(figures: &'static [&'static str], run: fn(&Bench, &Subject) -> Outcome) -> Experiment {
    Experiment { figures, for_qemu: false, repeats: true, run }
}

const DETERMINISTIC: &[Experiment] = &[
    experiment(&["api-cpu"], api),
    experiment(&["start", "init", "resident", "dirty", "pause"], boot),
    Experiment { figures: &["exit"], for_qemu: true, repeats: true, run: exit },
    Experiment {
        figures: &["exit-exits", "exit-faults", "exit-user", "exit-calls"],
        for_qemu: true,
        repeats: false,
        run: count_exit,
    },
    experiment(&["rand-read"], |bench, subject| block(bench, subject, "rand-read", RANDOM)),
    counts(&["rand-read-exits", "rand-read-calls"], |b, s| count_block(b, s, "rand-read", RANDOM)),
    experiment(&["rand-write"], |bench, subject| block(bench, subject, "rand-write", RANDOM)),
    counts(&["rand-write-exits", "rand-write-calls"], |b, s| count_block(b, s, "rand-write", RANDOM)),
    experiment(&["seq-read"], |bench, subject| block(bench, subject, "seq-read", SEQUENTIAL)),
    counts(&["seq-read-exits", "seq-read-calls"], |b, s| count_block(b, s, "seq-read", SEQUENTIAL)),
    experiment(&["seq-write"], |bench, subject| block(bench, subject, "seq-write", SEQUENTIAL)),
    counts(&["seq-write-exits", "seq-write-calls"], |b, s| count_block(b, s, "seq-write", SEQUENTIAL)),
];

const NET: [Experiment; 6] = [
    with_qemu(experiment(&["tcp-send"], |b, s| tcp(b, s, "tcp-send", STREAM))),
    with_qemu(counts(&["tcp-send-exits", "tcp-send-interrupts", "tcp-send-calls"], |b, s| {
        count_tcp(b, s, "tcp-send", STREAM)
    })),
    with_qemu(experiment(&["tcp-receive"], |b, s| tcp(b, s, "tcp-receive", STREAM))),
    with_qemu(counts(&["tcp-receive-exits", "tcp-receive-interrupts", "tcp-receive-calls"], |b, s| {
        count_tcp(b, s, "tcp-receive", STREAM)
    })),
    with_qemu(experiment(&["tcp-round-trip"], |b, s| tcp(b, s, "tcp-round-trip", ROUND_TRIPS))),
    with_qemu(counts(&["tcp-round-trip-exits", "tcp-round-trip-interrupts", "tcp-round-trip-calls"], |b, s| {
        count_tcp(b, s, "tcp-round-trip", ROUND_TRIPS)
    })),
];

const fn with_qemu(experiment: Experiment) -> Experiment {
    Experiment { for_qemu: true, ..experiment }
}

/// One that always yields the same.
pub const fn counts(figures: &'static [&'static str], run: fn(&Bench, &Subject) -> Outcome) -> Experiment {
    Experiment { figures, for_qemu: false, repeats: false, run }
}

const NATIVE: &[Experiment] = &[
    experiment(&["api", "api-cpu"], api),
    experiment(&["start"], start),
    experiment(&["pause", "resident", "dirty"], flat),
    counts(&["binary"], |_, subject| Ok(vec![("binary", std::fs::metadata(subject.path())?.len() as f64)])),
];

/// The measurements of a part.
pub fn of(part: Part) -> impl Iterator<Item = &'static Experiment> {
    let (own, others): (&[_], &[&[_]]) = match part {
        Part::Deterministic => (
            DETERMINISTIC,
            &[
                snapshot::DETERMINISTIC,
                vsock::EXPERIMENTS,
                &NET,
                &limits::EXPERIMENTS,
                jail::EXPERIMENTS,
                &together::EXPERIMENTS,
            ],
        ),
        Part::Native => (NATIVE, &[snapshot::NATIVE]),
    };
    own.iter().chain(others.iter().copied().flatten())
}

/// Everything a measurement needs.
#[derive(Debug)]
pub struct Bench {
    part: Part,
    files: Files,
    subjects: Vec<Subject>,
}

impl Bench {
    /// Brings all files into memory, the programs too.
    pub fn prepare(
        part: Part,
        mut subjects: Vec<Subject>,
        kernel: &Path,
        initramfs: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        let files = Files::prepare(kernel, initramfs)?;
        for (index, subject) in subjects.iter_mut().enumerate() {
            // QEMU finds its firmware from where it is.
            if !subject.is_qemu() {
                let copy = files.copy(subject.path(), &format!("vmm{index}"))?;
                let jailer =
                    subject.jailer().map(|jailer| files.copy(jailer, &format!("jailer{index}"))).transpose()?;
                subject.set_paths(copy, jailer);
            }
        }
        Ok(Self { part, files, subjects })
    }

    /// Whom to measure.
    pub fn subjects(&self) -> &[Subject] {
        &self.subjects
    }

    /// The files of the guests.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// What to do between two tries to reach an API: where there is one processor, whoever waits must leave it to the
    /// other.
    pub fn pause(&self) -> fn() {
        match self.part {
            Part::Deterministic => || std::thread::sleep(Duration::from_micros(50)),
            Part::Native => std::thread::yield_now,
        }
    }

    /// Starts a VMM with an API.
    pub fn launch(&self, subject: &Subject, more: &[&str]) -> Result<Api, Box<dyn Error>> {
        Api::start(subject, &self.files.path("api.sock"), more, self.pause())
    }

    /// Runs `job` to its end without an API.
    pub fn run(&self, subject: &Subject, job: Job<'_>) -> Result<Process, Box<dyn Error>> {
        let (kernel, initramfs) = (self.files.path("vmlinux"), self.files.path("initramfs"));
        if subject.is_qemu() {
            // Its microvm has no keyboard controller to reset by.
            let append = Files::boot_args(job).replace("reboot=k", "reboot=t");
            let (kernel, initramfs) = (kernel.to_string_lossy(), initramfs.to_string_lossy());
            let memory = MEMORY_MIB.to_string();
            let serial = !matches!(job, Job::Exit | Job::Ready);
            let mut arguments = vec![
                "-M",
                if serial {
                    "microvm,pit=off,pic=off,rtc=off"
                } else {
                    "microvm,pit=off,pic=off,rtc=off,isa-serial=off"
                },
                "-enable-kvm",
                "-cpu",
                "host",
                "-m",
                &memory,
                "-smp",
                "1",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-kernel",
                &kernel,
                "-initrd",
                &initramfs,
                "-append",
                &append,
            ];
            let netdev = format!("tap,id=net,ifname={},script=no,downscript=no,vhost=off", tap::NAME);
            if matches!(job, Job::Net(..)) {
                arguments.extend(["-netdev", &netdev, "-device", "virtio-net-device,netdev=net"]);
            }
            if serial {
                arguments.extend(["-chardev", "stdio,id=serial", "-serial", "chardev:serial"]);
            }
            return Ok(Process::start(subject.path(), &arguments)?);
        }
        let file = self.files.path("config.json");
        std::fs::write(&file, self.files.configuration(job, subject.image_mapping()).to_string())?;
        let file = file.to_string_lossy();
        let arguments = [subject.arguments(), &["--no-api", "--config-file", &file]].concat();
        Ok(Process::start(subject.path(), &arguments)?)
    }

    /// Memory of a VMM.
    pub fn resident(&self, process: &Process) -> Result<process::Resident, Box<dyn Error>> {
        process::resident(process.id(), &[&self.files.path("vmlinux"), &self.files.path("initramfs")])
    }
}

/// From `start` to `end`.
pub fn seconds(start: Instant, end: Instant) -> f64 {
    end.saturating_duration_since(start).as_secs_f64()
}

fn api(bench: &Bench, subject: &Subject) -> Outcome {
    let api = bench.launch(subject, &[])?;
    let answered = Instant::now();
    let cpu = api.process.cpu_time()?;
    Ok(vec![("api", seconds(api.process.started(), answered)), ("api-cpu", cpu.as_secs_f64())])
}

/// Starts a configured microVM; how long the call took.
pub fn instance_start(api: &mut Api) -> Result<Duration, Box<dyn Error>> {
    api.must("PUT", "/actions", &json!({ "action_type": "InstanceStart" }))
}

/// Pauses a microVM whose guest has come to rest.
fn pause(api: &mut Api) -> Result<Duration, Box<dyn Error>> {
    std::thread::sleep(Duration::from_millis(100));
    api.must("PATCH", "/vm", &json!({ "state": "Paused" }))
}

/// Boots Linux over the API, up to a sleeping init.
fn boot(bench: &Bench, subject: &Subject) -> Outcome {
    let mut api = bench.launch(subject, &["--boot-timer"])?;
    api.configure(&bench.files.configuration(Job::Ready, subject.image_mapping()))?;
    let sent = Instant::now();
    let reply = instance_start(&mut api)?;
    let (_, ready) = api.process.await_output("Guest-boot-time")?;
    let memory = bench.resident(&api.process)?;
    let pause = pause(&mut api)?;
    Ok(vec![
        ("start", reply.as_secs_f64()),
        ("init", seconds(sent, ready)),
        ("resident", memory.outside as f64),
        ("dirty", memory.dirty as f64),
        ("pause", pause.as_secs_f64()),
    ])
}

/// From the process's start to its end, with a guest that resets the machine at once.
fn exit(bench: &Bench, subject: &Subject) -> Outcome {
    let mut process = bench.run(subject, Job::Exit)?;
    let ended = process.await_end()?;
    Ok(vec![("exit", seconds(process.started(), ended))])
}

fn counted(bench: &Bench, subject: &Subject, job: Job<'_>) -> Result<Counts, Box<dyn Error>> {
    let mut counters = Counters::open().map_err(|error| format!("no tracepoints to count with: {error}"))?;
    bench.run(subject, job)?.await_end()?;
    Ok(counters.read()?)
}

fn count_exit(bench: &Bench, subject: &Subject) -> Outcome {
    let counts = counted(bench, subject, Job::Exit)?;
    Ok(vec![
        ("exit-exits", counts.exits),
        ("exit-faults", counts.faults),
        ("exit-user", counts.user),
        ("exit-calls", counts.calls),
    ])
}

/// Runs a job that reports its time, by the guest's clock; in seconds.
pub fn timed(bench: &Bench, subject: &Subject, job: Job<'_>) -> Result<f64, Box<dyn Error>> {
    let mut process = bench.run(subject, job)?;
    let (output, _) = process.await_output("bench ")?;
    process.await_end()?;
    let nanoseconds = output.lines().find_map(|line| line.strip_prefix("bench ")?.trim().parse::<u64>().ok());
    match nanoseconds {
        None | Some(0) => Err(format!("the guest's requests failed; it said {output:?}").into()),
        Some(all) => Ok(all as f64 * 1e-9),
    }
}

/// Time of one random request, or of all sequential ones.
fn block(bench: &Bench, subject: &Subject, kind: &'static str, requests: u32) -> Outcome {
    let all = timed(bench, subject, Job::Block(kind, requests))?;
    Ok(vec![(kind, all / if kind.starts_with("rand") { f64::from(requests) } else { 1.0 })])
}

/// Time of one round trip, or of all that is sent or received.
fn tcp(bench: &Bench, subject: &Subject, kind: &'static str, count: u32) -> Outcome {
    let _host = Host::start(kind, count)?;
    let all = timed(bench, subject, Job::Net(kind, count))?;
    Ok(vec![(kind, all / if kind == "tcp-round-trip" { f64::from(count) } else { 1.0 })])
}

/// What a MiB or a round trip costs: a run with some less one with none.
fn count_tcp(bench: &Bench, subject: &Subject, kind: &'static str, count: u32) -> Outcome {
    let run = |count| -> Result<Counts, Box<dyn Error>> {
        let _host = Host::start(kind, count)?;
        counted(bench, subject, Job::Net(kind, count))
    };
    let (without, with) = (run(0)?, run(count)?);
    let per = |with: f64, without: f64| (with - without) / f64::from(count);
    let [exits, interrupts, calls] = match kind {
        "tcp-send" => ["tcp-send-exits", "tcp-send-interrupts", "tcp-send-calls"],
        "tcp-receive" => ["tcp-receive-exits", "tcp-receive-interrupts", "tcp-receive-calls"],
        _ => ["tcp-round-trip-exits", "tcp-round-trip-interrupts", "tcp-round-trip-calls"],
    };
    Ok(vec![
        (exits, per(with.exits, without.exits)),
        (interrupts, per(with.interrupts, without.interrupts)),
        (calls, per(with.calls, without.calls)),
    ])
}

/// What a request costs in exits and system calls: a run with requests less one without.
fn count_block(bench: &Bench, subject: &Subject, kind: &'static str, requests: u32) -> Outcome {
    let without = counted(bench, subject, Job::Block(kind, 0))?;
    let with = counted(bench, subject, Job::Block(kind, requests))?;
    let per = |with: f64, without: f64| (with - without) / f64::from(requests);
    let (exits, calls) = match kind {
        "rand-read" => ("rand-read-exits", "rand-read-calls"),
        "rand-write" => ("rand-write-exits", "rand-write-calls"),
        "seq-read" => ("seq-read-exits", "seq-read-calls"),
        _ => ("seq-write-exits", "seq-write-calls"),
    };
    Ok(vec![(exits, per(with.exits, without.exits)), (calls, per(with.calls, without.calls))])
}

/// The call alone: where KVM cannot run Linux the guest fails after it.
fn start(bench: &Bench, subject: &Subject) -> Outcome {
    let mut api = bench.launch(subject, &[])?;
    api.configure(&bench.files.configuration(Job::Ready, subject.image_mapping()))?;
    Ok(vec![("start", instance_start(&mut api)?.as_secs_f64())])
}

/// A guest that any KVM can run.
fn flat(bench: &Bench, subject: &Subject) -> Outcome {
    let mut api = bench.launch(subject, &[])?;
    api.configure(&bench.files.flat_configuration())?;
    instance_start(&mut api)?;
    let end = Instant::now() + Duration::from_secs(10);
    let memory = loop {
        let memory = bench.resident(&api.process)?;
        if memory.guest >= FLAT_DIRTY {
            break memory;
        }
        if Instant::now() > end {
            return Err(format!("the flat guest did not run: {memory:?}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let pause = pause(&mut api)?;
    Ok(vec![("pause", pause.as_secs_f64()), ("resident", memory.outside as f64), ("dirty", memory.dirty as f64)])
}
