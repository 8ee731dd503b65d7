//! `--boot-timer`: how long a guest takes to say that it is up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Measures from InstanceStart to the guest's first write. Clones share one measurement.
#[derive(Debug, Clone, Default)]
pub struct BootTimer(Arc<Mutex<Option<(Instant, Duration)>>>);

impl BootTimer {
    /// InstanceStart begins.
    pub fn start(&self) {
        *self.lock() = Some((Instant::now(), process_cpu_time()));
    }

    /// The guest is up. Only the first time counts: a guest cannot fill the log with it.
    pub fn report(&self) {
        if let Some((started, cpu)) = self.lock().take() {
            let wall = started.elapsed().as_micros();
            let cpu = process_cpu_time().saturating_sub(cpu).as_micros();
            ::log::info!("Guest-boot-time = {wall} us {} ms, {cpu} CPU us {} CPU ms", wall / 1000, cpu / 1000);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Duration)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// CPU time of all threads of this process.
pub fn process_cpu_time() -> Duration {
    read_clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// The host's monotonic clock in microseconds, as launchers read it for `--start-time-us`.
pub fn monotonic_us() -> u64 {
    u64::try_from(read_clock(libc::CLOCK_MONOTONIC).as_micros()).unwrap_or(u64::MAX)
}

fn read_clock(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to; both clocks always exist.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
