//! The host's part of the vsock figures: a launcher that waits for its guest, then talks to it.

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use super::counters::{Counters, Counts};
use super::experiments::{Bench, Experiment, counts, experiment, instance_start};
use super::guest::Job;
use super::subject::{Api, Subject};

/// What the guest listens on; see resources/bench/vsock.rs.
pub const LISTEN_PORT: u32 = 5000;
/// Where the guest says that it does, on the host.
pub const READY_PORT: u32 = 1234;
/// Round trips of one byte, and of a message.
const BYTES: u32 = 2000;
const MESSAGES: u32 = 64;
const MESSAGE: usize = 32 << 10;
/// Before what is measured.
const WARM_UP: u32 = 5;
const LIMIT: Duration = Duration::from_secs(60);

/// The measurements.
pub const EXPERIMENTS: &[Experiment] = &[
    experiment(&["vsock-connect", "vsock-round-trip"], |bench, subject| {
        let mut talk = Talk::start(bench, subject, Job::Vsock)?;
        talk.echo(1, WARM_UP)?;
        let took = talk.echo(1, BYTES)?;
        Ok(vec![("vsock-connect", talk.connected.as_secs_f64()), ("vsock-round-trip", took / f64::from(BYTES))])
    }),
    counts(&["vsock-round-trip-exits", "vsock-round-trip-calls"], |bench, subject| {
        let (exits, calls) = count(bench, subject, 1, BYTES)?;
        Ok(vec![("vsock-round-trip-exits", exits), ("vsock-round-trip-calls", calls)])
    }),
    experiment(&["vsock-echo"], |bench, subject| {
        let mut talk = Talk::start(bench, subject, Job::Vsock)?;
        talk.echo(MESSAGE, WARM_UP)?;
        Ok(vec![("vsock-echo", talk.echo(MESSAGE, MESSAGES)?)])
    }),
    counts(&["vsock-echo-exits", "vsock-echo-calls"], |bench, subject| {
        let (exits, calls) = count(bench, subject, MESSAGE, MESSAGES)?;
        Ok(vec![("vsock-echo-exits", exits), ("vsock-echo-calls", calls)])
    }),
];

/// A guest that sends back what comes.
pub struct Talk {
    stream: UnixStream,
    /// From InstanceStart to the guest's own connection.
    connected: Duration,
    /// Its VMM.
    pub api: Api,
}

impl Talk {
    /// Boots it.
    pub fn start(bench: &Bench, subject: &Subject, job: Job<'_>) -> Result<Self, Box<dyn Error>> {
        let path = bench.files().path("v.sock");
        let ready = bench.files().path(&format!("v.sock_{READY_PORT}"));
        for stale in [&path, &ready] {
            let _ = std::fs::remove_file(stale);
        }
        let listener = UnixListener::bind(&ready)?;
        let mut api = bench.launch(subject, &[])?;
        api.configure(&bench.files().configuration(job, subject.image_mapping()))?;
        let sent = Instant::now();
        instance_start(&mut api)?;
        api.process.await_input(listener.as_fd())?;
        listener.accept()?;
        let connected = sent.elapsed();
        let stream = dial(&path, LISTEN_PORT)?;
        Ok(Self { stream, connected, api })
    }

    /// What is awaited for longer is an error.
    pub fn set_patience(&self, patience: Duration) -> std::io::Result<()> {
        self.stream.set_read_timeout(Some(patience))?;
        self.stream.set_write_timeout(Some(patience))
    }

    /// As [`echo`].
    pub fn echo(&mut self, length: usize, count: u32) -> Result<f64, Box<dyn Error>> {
        echo(&mut self.stream, length, count)
    }
}

/// Sends `count` messages of `length` bytes, each when the one before has come back. Returns seconds.
pub fn echo(stream: &mut UnixStream, length: usize, count: u32) -> Result<f64, Box<dyn Error>> {
    let message: Vec<u8> = (0..length).map(|i| (i * 7 + 1) as u8).collect();
    let mut answer = vec![0; length];
    let start = Instant::now();
    for _ in 0..count {
        stream.write_all(&message)?;
        stream.read_exact(&mut answer)?;
    }
    let took = start.elapsed();
    if answer == message { Ok(took.as_secs_f64()) } else { Err("the answer differs from the message".into()) }
}

/// Connects to `port` of the guest whose vsock is at `path`.
pub fn dial(path: &std::path::Path, port: u32) -> Result<UnixStream, Box<dyn Error>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(LIMIT))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(format!("unexpected answer {line:?}").into()) }
}

/// VM exits and system calls of one message.
fn count(bench: &Bench, subject: &Subject, length: usize, messages: u32) -> Result<(f64, f64), Box<dyn Error>> {
    let mut counters = Counters::open().map_err(|error| format!("no tracepoints to count with: {error}"))?;
    let mut talk = Talk::start(bench, subject, Job::Vsock)?;
    talk.echo(length, WARM_UP)?;
    let before = counters.read()?;
    talk.echo(length, messages)?;
    let after = counters.read()?;
    let per = |what: fn(&Counts) -> f64| (what(&after) - what(&before)) / f64::from(messages);
    Ok((per(|counts| counts.exits), per(|counts| counts.calls)))
}
