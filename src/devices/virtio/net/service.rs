//! The metadata service on an interface's link: it sits between the guest's queues and the TAP.
//!
//! ```text
//!  transmit queue ──▶ for the service? ──no──▶ TAP
//!                          │ yes                │
//!  receive queue  ◀──── Endpoint ◀───────────── ┘ behind what the service has to say
//! ```
//!
//! The beginning of each frame is copied before it is looked at, and what goes to the TAP is the
//! copy: a guest that changes a frame meanwhile changes what comes after.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::{HEADER_SIZE, Tap};
use crate::devices::boot_timer;
use crate::devices::virtio::IoVecs;
use crate::mmds::{Endpoint, endpoint};

/// The service, as an interface has it.
pub struct Service {
    endpoint: Endpoint,
    /// Fires when the service has something to say though nobody asked.
    timer: TimerFd,
    armed: bool,
    /// It has said all it had to say.
    silent: bool,
    /// The beginning of the frame at hand, and then all of it as it goes to the TAP.
    header: [u8; HEADER_SIZE + endpoint::HEADER],
    outgoing: IoVecs,
    /// The frame at hand, on its way to the service.
    received: Vec<u8>,
    /// The frame at hand, on its way to the guest, behind a header that asks for nothing.
    answer: [u8; HEADER_SIZE + endpoint::MAX_FRAME],
}

impl Service {
    /// Puts `endpoint` on an interface.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left for the timer.
    pub fn new(endpoint: Endpoint) -> io::Result<Self> {
        Ok(Self {
            endpoint,
            timer: TimerFd::new()?,
            armed: false,
            silent: true,
            header: [0; HEADER_SIZE + endpoint::HEADER],
            outgoing: IoVecs::default(),
            received: Vec::new(),
            answer: [0; HEADER_SIZE + endpoint::MAX_FRAME],
        })
    }

    /// The timer: when it fires, edge-triggered, frames are to be moved.
    pub fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes the frame in `buffers`, its header in front, if it is for the service; otherwise writes
    /// it to the TAP.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn send(&mut self, tap: &Tap, buffers: &mut IoVecs) -> io::Result<()> {
        // SAFETY: by this function's contract.
        let count = unsafe { buffers.read_slice(&mut self.header) };
        let beginning = &mut self.header[..count];
        let frame = beginning.get(HEADER_SIZE..).unwrap_or_default();
        if !self.endpoint.claims(frame) {
            self.outgoing.clear();
            self.outgoing.push(beginning.as_mut_ptr(), count);
            self.outgoing.append(buffers);
            // SAFETY: guest memory is alive by this function's contract, and the beginning is ours.
            return unsafe { tap.write(self.outgoing.as_slice()) }.map(drop);
        }
        self.received.clear();
        self.received.extend_from_slice(frame);
        // No longer than a frame: the caller has checked.
        // SAFETY: by this function's contract.
        unsafe { buffers.read_to(&mut self.received) };
        self.endpoint.receive(&mut self.received, now());
        self.silent = false;
        // The next may come in hours.
        self.received.shrink_to(endpoint::MAX_FRAME);
        Ok(())
    }

    /// It has something to say. While the guest cannot be told, no timer says so again.
    pub fn timer_fired(&mut self) {
        self.silent = false;
    }

    /// Whether there may be something for the guest.
    pub fn may_speak(&self) -> bool {
        !self.endpoint.is_quiet()
    }

    /// The next frame for the guest, with its header in front.
    pub fn next(&mut self) -> Option<&[u8]> {
        let length = self.endpoint.transmit(&mut self.answer[HEADER_SIZE..], now());
        self.silent = length.is_none();
        Some(&self.answer[..HEADER_SIZE + length?])
    }

    /// Sets the timer, once all was said. As long as the guest has no buffers for what there is, its
    /// next notification is what matters.
    pub fn set_timer(&mut self) {
        let delay = if self.silent && self.may_speak() { self.endpoint.delay(now()) } else { None };
        // A timer that cannot be set is missed only by a guest that loses frames.
        match delay {
            Some(delay) => self.armed = self.timer.reset(delay, None).is_ok(),
            None if self.armed => self.armed = self.timer.clear().is_err(),
            None => {}
        }
    }

    /// The guest's driver starts anew.
    pub fn reset(&mut self) {
        self.endpoint.reset();
        self.silent = true;
        self.set_timer();
    }
}

/// All interfaces share one clock: a token that one of them issued is good at the others.
fn now() -> Duration {
    Duration::from_micros(boot_timer::monotonic_us())
}
