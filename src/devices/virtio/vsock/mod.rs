//! virtio-vsock (virtio 1.2 §5.10): stream sockets between the guest and host processes on Unix sockets.
//!
//! - Host to guest: a process connects to `uds_path`, sends `CONNECT port\n` and reads `OK hostport\n`; where the
//!   guest does not accept, its connection is closed.
//! - Guest to host: a connection to CID 2 and a port goes to the socket `uds_path_port`; where nobody listens, or
//!   as many wait there as it takes, the guest's connection is reset.
//!
//! ```text
//!  guest ──rx, tx queues──▶ Vsock ──packets──▶ Muxer ──▶ Link = Connection (state) + Peer (Unix socket)
//! ```
//!
//! Data moves between Unix socket and guest memory without a copy in between; only what a peer does not take
//! at once is kept here, within the credit that the guest was given. Connections do not live on in a snapshot: a guest that
//! comes out of one is told on the event queue that they are gone, and nothing reaches it before it has read that.
//!
//! A guest that gives credit for what it has read before it answers is asked to notify of both at once.
//!
//! System calls after the start: `epoll_wait`, `epoll_ctl`, `accept4`, `recvfrom`, `recvmsg`, `sendmsg`, `socket`,
//! `connect`, `shutdown`, `close`, `timerfd_settime`, and `clock_gettime` where the vDSO has none.

pub(crate) mod connection;
mod guest;
mod host;
mod muxer;
mod packet;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::Once;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use self::guest::Queues;
use self::muxer::Muxer;
use super::{Activation, CONFIG_SPACE_SIZE, KICK, Kind, Position, Progress, Source, Violation, VirtioDevice};
use crate::config::VsockConfig;
use crate::metrics::METRICS;

/// VIRTIO_VSOCK_F_STREAM.
const F_STREAM: u64 = 1 << 0;
/// Sizes of the queues rx, tx and event. The driver fills the rx queue with buffers, one page each, at boot.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// Descriptors this process may have: for all connections, and for everything else.
const DESCRIPTORS: libc::rlim_t = 2048;

/// Source tag: something happened on the host's side.
const HOST: u8 = 1;
/// Source tag: the driver is to be told what was put off, and may have put something off itself.
const LATER: u8 = 2;
/// How long that may be, or twice as long.
const LATEST: Duration = Duration::from_millis(2);

/// The device.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    /// When the driver is told that packets were taken, and looked for what it was asked not to notify of, if there was
    /// no occasion before.
    timer: TimerFd,
    timer_runs: bool,
    /// The host's side has to be looked at without an event.
    unpolled: bool,
    active: Option<Queues>,
    /// The driver wants no more; the vmm thread has still to close the connections.
    stopped: bool,
}

impl Vsock {
    /// The device of the guest with the configured CID, whose host processes connect through `listener`.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn new(config: &VsockConfig, listener: UnixListener) -> io::Result<Self> {
        allow_descriptors();
        Ok(Self {
            guest_cid: config.guest_cid.into(),
            muxer: Muxer::new(config.uds_path.clone(), listener)?,
            timer: TimerFd::new()?,
            timer_runs: false,
            unpolled: true,
            active: None,
            stopped: false,
        })
    }

    fn exchange(&mut self, tag: u8) -> Result<Progress, Violation> {
        if tag == LATER {
            self.timer_runs = false;
        }
        let Some(queues) = &mut self.active else {
            self.unpolled = true;
            return Ok(Progress::Idle);
        };
        let (muxer, guest) = (&mut self.muxer, self.guest_cid);
        if tag == HOST || self.unpolled {
            self.unpolled = muxer.poll();
        }
        let mut progress = Progress::Idle;
        if tag == KICK {
            METRICS.vsock.queue_event_count.inc();
        }
        if tag == KICK || queues.holds_back {
            progress = queues.take_packets(muxer, guest)?;
        }
        if tag == LATER {
            queues.expect_no_answer();
        }
        if !queues.knows_of_reset()? {
            queues.announce(false);
            return Ok(progress);
        }
        if self.unpolled {
            progress = Progress::More;
        }
        let held_back = !muxer.takes_packets();
        let sent = queues.send_packets(muxer, guest)?;
        progress = progress.max(sent);
        if held_back && muxer.takes_packets() {
            progress = Progress::More;
        }
        progress = progress.max(queues.await_answer(muxer)?);
        // What waits now may have begun to wait after the timer was started.
        let overdue = tag == LATER && !queues.announced;
        let waits = queues.announce(!overdue) || queues.holds_back;
        if waits && !self.timer_runs {
            queues.announced = false;
            self.timer_runs = self.timer.reset(LATEST, None).is_ok();
            if !self.timer_runs {
                queues.announce(false);
                queues.expect_no_answer();
                progress = Progress::More;
            }
        }
        Ok(progress)
    }
}

/// Every connection takes a descriptor: the soft limit, often 1,024, is raised as far as the hard limit allows. Once, so
/// that whoever sets it higher later is not set back.
fn allow_descriptors() {
    static RAISED: Once = Once::new();
    RAISED.call_once(|| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is valid for writing.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
        let wanted = DESCRIPTORS.min(limit.rlim_max);
        if known && limit.rlim_cur < wanted {
            limit.rlim_cur = wanted;
            // SAFETY: `limit` is valid for reading. Should it fail, fewer connections are possible.
            unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
        }
    });
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    /// The guest's CID (§5.10.4).
    fn config_space(&self) -> [u8; CONFIG_SPACE_SIZE] {
        let mut space = [0; CONFIG_SPACE_SIZE];
        space[..8].copy_from_slice(&self.guest_cid.to_le_bytes());
        space
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Queues::new(activation.queues);
    }

    fn reset(&mut self) -> bool {
        self.active = None;
        self.stopped = !self.muxer.is_clear();
        !self.stopped
    }

    fn on_event(&mut self, tag: u8) -> Result<Progress, Violation> {
        if self.stopped {
            self.muxer.clear();
            self.stopped = false;
        }
        // A guest that has to reset the device has lost its connections.
        self.exchange(tag).inspect_err(|_| self.muxer.clear())
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { tag: HOST, fd: self.muxer.as_raw_fd() }, Source { tag: LATER, fd: self.timer.as_raw_fd() }]
    }

    /// Nothing is ever in flight: what an event has begun is done when it returns. What the guest was
    /// not told yet it is told now, for a snapshot does not know of it.
    fn quiesce(&mut self) {
        if let Some(queues) = &mut self.active {
            queues.announce(false);
        }
    }

    fn positions(&self) -> Vec<Position> {
        self.active.iter().flat_map(Queues::positions).collect()
    }

    fn on_restored(&mut self) {
        if let Some(queues) = &mut self.active {
            queues.reset_transport();
        }
        self.muxer.leave_ports();
    }

    fn count_violation(&self) {
        METRICS.vsock.needs_reset.inc();
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_races;
#[cfg(any(test, fuzzing))]
pub(crate) mod tests_random;
