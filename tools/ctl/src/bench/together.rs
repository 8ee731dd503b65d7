//! All devices of one guest at work at once: none may stall, and this is how much memory the VMM takes for it. What the
//! guest does says resources/bench/together.rs.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::experiments::{Bench, Experiment, Outcome, counts, experiment};
use super::guest::Job;
use super::process::{self, Resident};
use super::subject::Subject;
use super::tap::Host;
use super::vsock::Talk;

/// Bytes of a piece over the network, and of a message over vsock.
const PIECE: usize = 64 << 10;
const MESSAGE: usize = 32 << 10;
/// What does nothing for that long has stalled.
const STALL: Duration = Duration::from_secs(1);
/// Unless VESICLE_SECONDS says another number.
const SECONDS: u64 = 4;

/// The measurements.
pub const EXPERIMENTS: [Experiment; 2] = [
    counts(&["together-block", "together-tcp", "together-vsock"], |bench, subject| {
        let seconds = std::env::var("VESICLE_SECONDS").ok().map_or(Ok(SECONDS), |seconds| seconds.parse())?;
        let (rates, _) = busy(bench, subject, Duration::from_secs(seconds))?;
        Ok(["together-block", "together-tcp", "together-vsock"].into_iter().zip(rates).collect())
    }),
    experiment(&["resident-all", "dirty-all"], |bench, subject| -> Outcome {
        let (_, memory) = busy(bench, subject, Duration::from_secs(1))?;
        Ok(vec![("resident-all", memory.outside as f64), ("dirty-all", memory.dirty as f64)])
    }),
];

/// Bytes that drive and network have moved.
#[derive(Debug, Default)]
struct Moved([AtomicU64; 2]);

impl Moved {
    fn read(&self) -> [u64; 2] {
        self.0.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }
}

/// The host's end of the network: receives a piece, sends one.
fn exchange(mut connection: TcpStream, moved: &Moved) -> io::Result<()> {
    connection.set_nodelay(true)?;
    // The guest ends without a word.
    connection.set_read_timeout(Some(10 * STALL))?;
    connection.set_write_timeout(Some(10 * STALL))?;
    let mut piece = vec![0; PIECE];
    let [drive, network] = &moved.0;
    loop {
        connection.read_exact(&mut piece)?;
        let count = piece.first_chunk().copied().unwrap_or_default();
        drive.store(u64::from_le_bytes(count), Ordering::Relaxed);
        connection.write_all(&piece)?;
        network.fetch_add(2 * PIECE as u64, Ordering::Relaxed);
    }
}

/// Keeps all devices busy for that long. Returns the bytes a second of drive, network and vsock, and the VMM's memory at
/// the end.
fn busy(bench: &Bench, subject: &Subject, time: Duration) -> Result<([f64; 3], Resident), Box<dyn Error>> {
    let moved = Arc::new(Moved::default());
    let theirs = Arc::clone(&moved);
    let _host = Host::start_with(move |connection| exchange(connection, &theirs))?;
    let mut talk = Talk::start(bench, subject, Job::Together)?;
    let begin = Instant::now() + 10 * STALL;
    while moved.read().contains(&0) {
        if Instant::now() > begin {
            return Err(format!("drive or network did not begin: {:?} bytes", moved.read()).into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    talk.set_patience(2 * STALL)?;
    let (start, before) = (Instant::now(), moved.read());
    let (mut checked, mut last, mut messages) = (start, before, 0);
    while start.elapsed() < time {
        let took = talk.echo(MESSAGE, 1).map_err(|error| {
            let threads = process::threads(talk.api.process.id());
            format!(
                "vsock: {error}, after {:?}, drive and network at {:?} bytes; {threads}",
                start.elapsed(),
                moved.read()
            )
        })?;
        messages += 1;
        if took >= STALL.as_secs_f64() {
            return Err(format!("vsock: {took} s for a message, after {:?}", start.elapsed()).into());
        }
        if checked.elapsed() >= STALL {
            let now = moved.read();
            if let Some(index) = (0..2).find(|&index| now[index] == last[index]) {
                let which = ["drive", "network"][index];
                return Err(format!("{which}: nothing moved for a second, after {:?}", start.elapsed()).into());
            }
            (checked, last) = (Instant::now(), now);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let [drive, network] = std::array::from_fn(|index| (moved.read()[index] - before[index]) as f64 / seconds);
    let vsock = f64::from(messages) * 2.0 * MESSAGE as f64 / seconds;
    Ok(([drive, network, vsock], bench.resident(&talk.api.process)?))
}
