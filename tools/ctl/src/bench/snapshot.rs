//! Snapshots: how long it takes to save a microVM, to load it in a new process, and to take it back in its own.

use std::error::Error;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::counters::{Counters, Counts};
use super::experiments::{Bench, Experiment, counts, experiment, instance_start, seconds};
use super::guest::{FLAT_DIRTY, Job};
use super::subject::{Api, Subject};
use super::vsock::{self, LISTEN_PORT, READY_PORT};
use crate::snapshot::record::{Of, Record};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A guest that waits for a client on its vsock.
pub const DETERMINISTIC: &[Experiment] = &[
    experiment(&["snapshot", "load", "load-echo"], |bench, subject| {
        let snapshot = serving(bench, subject)?.save(bench)?;
        let mut clone = MicroVm::launch(bench, subject)?;
        let start = Instant::now();
        let load = clone.load(bench)?;
        let _client = first_echo(bench)?;
        let echo = seconds(start, Instant::now());
        Ok(vec![("snapshot", snapshot.as_secs_f64()), ("load", load.as_secs_f64()), ("load-echo", echo)])
    }),
    experiment(&["warm", "warm-echo"], |bench, subject| {
        recorded(bench, subject)?;
        let mut clone = MicroVm::launch(bench, subject)?;
        let start = Instant::now();
        let load = clone.load_with(bench, &json!({ "working_set_path": bench.files().path("working-set") }))?;
        let _client = first_echo(bench)?;
        Ok(vec![("warm", load.as_secs_f64()), ("warm-echo", seconds(start, Instant::now()))])
    }),
    experiment(&["shell", "shell-echo"], |bench, subject| {
        recorded(bench, subject)?;
        let mut clone = MicroVm::prepare(bench, subject, true)?;
        let start = Instant::now();
        let load = clone.load(bench)?;
        let _client = first_echo(bench)?;
        Ok(vec![("shell", load.as_secs_f64()), ("shell-echo", seconds(start, Instant::now()))])
    }),
    experiment(&["reset", "reset-echo"], |bench, subject| {
        serving(bench, subject)?.save(bench)?;
        let mut clone = MicroVm::launch(bench, subject)?;
        clone.load(bench)?;
        // The guest ends when its client goes, so that one stays until the reset.
        let _client = first_echo(bench)?;
        let start = Instant::now();
        let reset = clone.reset()?;
        let _next = first_echo(bench)?;
        Ok(vec![("reset", reset.as_secs_f64()), ("reset-echo", seconds(start, Instant::now()))])
    }),
    counts(&["snapshot-calls"], |bench, subject| {
        let mut counters = open_counters()?;
        let mut origin = serving(bench, subject)?;
        origin.pause()?;
        let before = counters.read()?;
        origin.create(bench)?;
        Ok(vec![("snapshot-calls", counters.read()?.calls - before.calls)])
    }),
    counts(&["load-echo-exits", "load-echo-faults", "load-echo-calls"], |bench, subject| {
        serving(bench, subject)?.save(bench)?;
        let mut counters = open_counters()?;
        let mut clone = MicroVm::launch(bench, subject)?;
        let before = counters.read()?;
        clone.load(bench)?;
        let _client = first_echo(bench)?;
        let [exits, faults, calls] = difference(&before, &counters.read()?);
        Ok(vec![("load-echo-exits", exits), ("load-echo-faults", faults), ("load-echo-calls", calls)])
    }),
    counts(&["reset-echo-exits", "reset-echo-faults", "reset-echo-calls"], |bench, subject| {
        serving(bench, subject)?.save(bench)?;
        let mut counters = open_counters()?;
        let mut clone = MicroVm::launch(bench, subject)?;
        clone.load(bench)?;
        let _client = first_echo(bench)?;
        let before = counters.read()?;
        clone.reset()?;
        let _next = first_echo(bench)?;
        let [exits, faults, calls] = difference(&before, &counters.read()?);
        Ok(vec![("reset-echo-exits", exits), ("reset-echo-faults", faults), ("reset-echo-calls", calls)])
    }),
];

/// Guests that any KVM can run.
pub const NATIVE: &[Experiment] = &[
    experiment(&["snapshot", "load", "reset"], |bench, subject| {
        let snapshot = flat(bench, subject, &bench.files().flat_configuration())?.save(bench)?;
        let mut clone = MicroVm::launch(bench, subject)?;
        let load = clone.load(bench)?;
        rest();
        let reset = clone.reset()?;
        let values = [("snapshot", snapshot), ("load", load), ("reset", reset)];
        Ok(values.map(|(id, took)| (id, took.as_secs_f64())).to_vec())
    }),
    experiment(&["shell"], |bench, subject| {
        flat(bench, subject, &bench.files().flat_configuration())?.save(bench)?;
        let mut clone = MicroVm::prepare(bench, subject, false)?;
        Ok(vec![("shell", clone.load(bench)?.as_secs_f64())])
    }),
    experiment(&["reset-drop"], |bench, subject| {
        flat(bench, subject, &bench.files().busy_configuration())?.save(bench)?;
        let mut clone = MicroVm::launch(bench, subject)?;
        clone.load(bench)?;
        clone.await_dirty(bench)?;
        Ok(vec![("reset-drop", clone.reset()?.as_secs_f64())])
    }),
];

/// Saves a guest, and records the working set of a first echo.
fn recorded(bench: &Bench, subject: &Subject) -> Result<()> {
    serving(bench, subject)?.save(bench)?;
    let mut first = MicroVm::launch(bench, subject)?;
    first.load(bench)?;
    let _client = first_echo(bench)?;
    first.record(bench)
}

fn open_counters() -> Result<Counters> {
    Counters::open().map_err(|error| format!("no tracepoints to count with: {error}").into())
}

fn difference(before: &Counts, after: &Counts) -> [f64; 3] {
    [after.exits - before.exits, after.faults - before.faults, after.calls - before.calls]
}

/// Lets what a call set in motion come to rest. Where the clock counts instructions each sample would begin at the same
/// moment between two of the host's ticks, of 4 ms, unless this takes longer each time.
fn rest() {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let more = COUNT.fetch_add(1, Ordering::Relaxed) * 617 % 4000;
    std::thread::sleep(Duration::from_millis(100) + Duration::from_micros(more));
}

/// A microVM that was booted or, in another process, loaded.
struct MicroVm(Api);

/// Starts a VMM that may write snapshots, which a confined one has to be told.
fn launch(bench: &Bench, subject: &Subject) -> Result<Api> {
    let help = Command::new(subject.path()).arg("--help").output()?;
    let allowed = format!("--allow-path={}", bench.files().path("").display());
    if subject.is_confined() && String::from_utf8_lossy(&help.stdout).contains("--allow-path") {
        return bench.launch(subject, &[&allowed]);
    }
    bench.launch(subject, &[])
}

/// Boots the guest up to where it waits for its client.
fn serving(bench: &Bench, subject: &Subject) -> Result<MicroVm> {
    let (path, ready) = (bench.files().path("v.sock"), bench.files().path(&format!("v.sock_{READY_PORT}")));
    for stale in [&path, &ready] {
        let _ = fs::remove_file(stale);
    }
    let listener = UnixListener::bind(&ready)?;
    let mut api = launch(bench, subject)?;
    api.configure(&bench.files().configuration(Job::Vsock, subject.image_mapping()))?;
    instance_start(&mut api)?;
    api.process.await_input(listener.as_fd())?;
    let _connected = listener.accept()?;
    rest();
    Ok(MicroVm(api))
}

/// Starts a flat guest and waits until it has written all it writes.
fn flat(bench: &Bench, subject: &Subject, configuration: &Value) -> Result<MicroVm> {
    let mut api = launch(bench, subject)?;
    api.configure(configuration)?;
    instance_start(&mut api)?;
    let flat = MicroVm(api);
    flat.await_dirty(bench)?;
    Ok(flat)
}

fn first_echo(bench: &Bench) -> Result<UnixStream> {
    let mut stream = vsock::dial(&bench.files().path("v.sock"), LISTEN_PORT)?;
    vsock::echo(&mut stream, 1, 1)?;
    Ok(stream)
}

impl MicroVm {
    /// A process that waits for the load. What the one before it leaves to the kernel is done by then.
    fn launch(bench: &Bench, subject: &Subject) -> Result<Self> {
        let _ = fs::remove_file(bench.files().path("v.sock"));
        let process = bench.launch(subject, &[])?;
        rest();
        Ok(Self(process))
    }

    /// A shell that waits for the load, with what a first run writes copied if that was recorded.
    fn prepare(bench: &Bench, subject: &Subject, recorded: bool) -> Result<Self> {
        let _ = fs::remove_file(bench.files().path("v.sock"));
        let argument = |flag, file| format!("--{flag}={}", bench.files().path(file).display());
        let arguments = [argument("prepare", "state"), argument("working-set-path", "working-set")];
        let arguments: Vec<_> = arguments.iter().map(String::as_str).take(if recorded { 2 } else { 1 }).collect();
        let shell = bench.launch(subject, &arguments)?;
        rest();
        Ok(Self(shell))
    }

    /// Pauses the microVM and notes what it has touched.
    fn record(&mut self, bench: &Bench) -> Result<()> {
        self.pause()?;
        let files = bench.files();
        let (state, memory, output) = (files.path("state"), files.path("memory"), files.path("working-set"));
        Record { state, memory, output, of: Of::Process(self.0.process.id()) }.run().map(drop)
    }

    /// Waits until the flat guest has written to [`FLAT_DIRTY`] bytes.
    fn await_dirty(&self, bench: &Bench) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        while bench.resident(&self.0.process)?.guest < FLAT_DIRTY {
            if Instant::now() > end {
                return Err("the flat guest did not run".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.0.must("PATCH", "/vm", &json!({ "state": "Paused" })).map(drop)
    }

    /// Pauses and saves the microVM, and ends it; how long the saving took.
    fn save(mut self, bench: &Bench) -> Result<Duration> {
        self.pause()?;
        self.create(bench)
    }

    fn create(&mut self, bench: &Bench) -> Result<Duration> {
        let (state, memory) = (bench.files().path("state"), bench.files().path("memory"));
        for stale in [&state, &memory] {
            let _ = fs::remove_file(stale);
        }
        let request = json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory });
        self.0.must("PUT", "/snapshot/create", &request)
    }

    /// Loads what was saved and runs it; how long until the reply.
    fn load(&mut self, bench: &Bench) -> Result<Duration> {
        self.load_with(bench, &json!({}))
    }

    /// The same with `more` in the request.
    fn load_with(&mut self, bench: &Bench, more: &Value) -> Result<Duration> {
        let mut request = json!({
            "snapshot_path": bench.files().path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": bench.files().path("memory") },
            "resume_vm": true,
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            request[field] = value.clone();
        }
        self.0.must("PUT", "/snapshot/load", &request)
    }

    fn reset(&mut self) -> Result<Duration> {
        self.0.must("PUT", "/snapshot/reset", &json!({}))
    }
}
