//! Whether a VMM sleeps.

use std::fs;
use std::time::{Duration, Instant};

use super::wait_until;

/// What is looked at in one go. Longer than what a wake or two may be charged where the host's other work counts as ours.
const WINDOW: Duration = Duration::from_secs(1);

/// Processor time that the thread which does the devices' work has used.
fn processor_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split_ascii_whitespace().next().unwrap().parse().unwrap())
}

/// Waits for a second in which the thread that does the devices' work takes less than 3 % of a processor. A busy host may
/// make one second look worse than it is; a thread that spins never has a quiet one.
pub fn wait_until_at_rest(pid: u32) {
    wait_until(|| {
        let (start, before) = (Instant::now(), processor_time(pid));
        std::thread::sleep(WINDOW);
        processor_time(pid) - before < start.elapsed() * 3 / 100
    });
}
