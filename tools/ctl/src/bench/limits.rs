//! How exactly rate limits are kept, where there is more to move than they let through: by how much they are missed, in
//! either direction, as a share of the limit. Over seconds, and after a full bucket is spent.

use std::error::Error;
use std::fs;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::experiments::{Bench, Experiment, Outcome, counts, timed};
use super::guest::{Job, Limit};
use super::subject::Subject;
use super::tap::{self, Host};

/// Of a bucket, and how long one takes to fill.
const BUCKETS_A_SECOND: u64 = 10;
/// What is measured.
const TIME: Duration = Duration::from_secs(3);
const MIB: u64 = 1 << 20;

const SLOW: Limit = Limit::Bandwidth(MIB);
const FAST: Limit = Limit::Bandwidth(50 * MIB);
const FEW: Limit = Limit::Operations(100);
const MANY: Limit = Limit::Operations(5000);

/// How a guest reads and writes: 4 KiB at random places, 1 MiB one after the other, and the former four at a time, as
/// one at a time waits for its token, and then again for its data.
const READ: [&str; 3] = ["rand-read", "seq-read", "deep-read"];
const WRITE: [&str; 3] = ["rand-write", "seq-write", "deep-write"];

/// The measurements.
pub const EXPERIMENTS: [Experiment; 16] = [
    counts(&["limit-read-1"], |b, s| drive(b, s, "limit-read-1", READ, SLOW)),
    counts(&["limit-read-50"], |b, s| drive(b, s, "limit-read-50", READ, FAST)),
    counts(&["limit-read-100"], |b, s| drive(b, s, "limit-read-100", READ, FEW)),
    counts(&["limit-read-5000"], |b, s| drive(b, s, "limit-read-5000", READ, MANY)),
    counts(&["limit-write-1"], |b, s| drive(b, s, "limit-write-1", WRITE, SLOW)),
    counts(&["limit-write-50"], |b, s| drive(b, s, "limit-write-50", WRITE, FAST)),
    counts(&["limit-write-100"], |b, s| drive(b, s, "limit-write-100", WRITE, FEW)),
    counts(&["limit-write-5000"], |b, s| drive(b, s, "limit-write-5000", WRITE, MANY)),
    counts(&["limit-send-1"], |b, s| network(b, s, "limit-send-1", "tcp-send", SLOW)),
    counts(&["limit-send-50"], |b, s| network(b, s, "limit-send-50", "tcp-send", FAST)),
    counts(&["limit-send-100"], |b, s| network(b, s, "limit-send-100", "udp-send", FEW)),
    counts(&["limit-send-5000"], |b, s| network(b, s, "limit-send-5000", "udp-send", MANY)),
    counts(&["limit-receive-1"], |b, s| network(b, s, "limit-receive-1", "tcp-receive", SLOW)),
    counts(&["limit-receive-50"], |b, s| network(b, s, "limit-receive-50", "tcp-receive", FAST)),
    counts(&["limit-receive-100"], |b, s| network(b, s, "limit-receive-100", "udp-receive", FEW)),
    counts(&["limit-receive-5000"], |b, s| network(b, s, "limit-receive-5000", "udp-receive", MANY)),
];

/// By how much `rate` differs from `limit`.
fn deviation(rate: f64, limit: Limit) -> f64 {
    (rate / limit.rate() as f64 - 1.0).abs()
}

/// As many requests as take [`TIME`]: of 1 MiB where that is little, else of 4 KiB. The guest's clock says how long they
/// take once the bucket is spent that it begins with.
fn drive(bench: &Bench, subject: &Subject, figure: &'static str, kinds: [&'static str; 3], limit: Limit) -> Outcome {
    let [random, sequential, deep] = kinds;
    let (kind, size) = match limit {
        Limit::Bandwidth(rate) if rate > MIB => (sequential, MIB),
        Limit::Bandwidth(_) => (random, 4096),
        Limit::Operations(_) => (deep, 1),
    };
    let bucket = limit.rate() / BUCKETS_A_SECOND;
    let requests = (limit.rate() * TIME.as_secs() + bucket) / size;
    let _busy = Background::idle();
    let took = timed(bench, subject, Job::Limited(kind, u32::try_from(requests)?, limit))?;
    Ok(vec![(figure, deviation((requests * size - bucket) as f64 / took, limit))])
}

/// What the host's kernel sees cross the TAP, once the bucket is spent.
fn network(bench: &Bench, subject: &Subject, figure: &'static str, kind: &'static str, limit: Limit) -> Outcome {
    const ENDLESS: u32 = 1 << 20;
    let _busy = Background::idle();
    let _host = Host::start(kind, ENDLESS)?;
    let _flood = if kind == "udp-receive" { Some(Background::flood(3 * limit.rate() / 2)?) } else { None };
    let direction = if kind.ends_with("send") { "rx" } else { "tx" };
    let what = if matches!(limit, Limit::Bandwidth(_)) { "bytes" } else { "packets" };
    let counter = format!("/sys/class/net/{}/statistics/{direction}_{what}", tap::NAME);
    let count = || -> Result<u64, Box<dyn Error>> { Ok(fs::read_to_string(&counter)?.trim().parse()?) };
    let _vmm = bench.run(subject, Job::Limited(kind, ENDLESS, limit))?;
    // Much more than addresses and a connection take.
    let begun = limit.rate() / BUCKETS_A_SECOND + 2;
    let end = Instant::now() + Duration::from_secs(20);
    while count()? < begun {
        if Instant::now() > end {
            return Err(format!("{kind}: only {} {what} in 20 s", count()?).into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    thread::sleep(Duration::from_secs(1) / 2);
    let (start, before) = (Instant::now(), count()?);
    thread::sleep(TIME);
    let crossed = count()? - before;
    Ok(vec![(figure, deviation(crossed as f64 / start.elapsed().as_secs_f64(), limit))])
}

/// What a thread does again and again until this is dropped.
struct Background(Arc<AtomicBool>);

impl Background {
    fn start(mut work: impl FnMut() + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&over);
        thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                work();
            }
        });
        Self(over)
    }

    /// Small datagrams to the guest at an even pace.
    fn flood(per_second: u64) -> Result<Self, Box<dyn Error>> {
        let socket = UdpSocket::bind((tap::ADDRESS, 0))?;
        let (start, mut sent) = (Instant::now(), 0);
        Ok(Self::start(move || {
            while sent < start.elapsed().as_millis() as u64 * per_second / 1000 {
                // Nobody may be there yet.
                let _ = socket.send_to(&[7; 64], (tap::GUEST, tap::PORT));
                sent += 1;
            }
            thread::sleep(Duration::from_millis(2));
        }))
    }

    /// Something to execute whenever there is nothing else: a clock that counts instructions goes by the host's while its
    /// processor is idle, and leaps where the host is busy.
    fn idle() -> Self {
        let mut begun = false;
        Self::start(move || {
            if !begun {
                let priority: libc::c_int = 0;
                // SAFETY: the priority, all of a `sched_param` to the kernel, is valid for reading. If it fails this
                // thread takes more than its share. The call itself: musl's function for it does nothing.
                unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_IDLE, &raw const priority) };
                begun = true;
            }
            std::hint::black_box((0..100_000u32).fold(0, |sum: u32, n| std::hint::black_box(sum ^ n)));
        })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
