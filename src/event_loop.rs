//! One epoll instance for the vmm thread: descriptors become tokens.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::os::retried;

/// What a descriptor means to the vmm thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The API thread sent a command.
    Command,
    /// SIGTERM or SIGINT.
    Signal,
    /// A vCPU parked or ended.
    Vcpu,
    /// The guest reset the machine through the i8042.
    Reset,
    /// The serial port has output, or room for input.
    Serial,
    /// Standard input is readable.
    Input,
    /// The serial port's destination takes output again.
    OutputReady,
    /// Time to write the metrics.
    Metrics,
    /// Who serves guest memory is gone.
    HandlerGone,
    /// A virtio device's descriptor: its index and the tag it gave.
    Device(u8, u8),
}

impl Token {
    fn pack(self) -> u64 {
        match self {
            Self::Command => 0,
            Self::Signal => 1,
            Self::Vcpu => 2,
            Self::Reset => 3,
            Self::Serial => 4,
            Self::Input => 5,
            Self::OutputReady => 6,
            Self::Metrics => 7,
            Self::HandlerGone => 8,
            Self::Device(index, tag) => 0x1_0000 | u64::from(index) << 8 | u64::from(tag),
        }
    }

    fn unpack(packed: u64) -> Option<Self> {
        let [tag, index, device, ..] = packed.to_le_bytes();
        Some(match (device, packed) {
            (1, _) => Self::Device(index, tag),
            (_, 0) => Self::Command,
            (_, 1) => Self::Signal,
            (_, 2) => Self::Vcpu,
            (_, 3) => Self::Reset,
            (_, 4) => Self::Serial,
            (_, 5) => Self::Input,
            (_, 6) => Self::OutputReady,
            (_, 7) => Self::Metrics,
            (_, 8) => Self::HandlerGone,
            _ => return None,
        })
    }
}

/// When a descriptor is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// As long as it is readable.
    Readable,
    /// Once for each time it becomes readable: an eventfd then never needs to be read.
    BecameReadable,
    /// Once when it becomes writable.
    BecameWritable,
}

impl When {
    fn events(self) -> EventSet {
        match self {
            Self::Readable => EventSet::IN,
            Self::BecameReadable => EventSet::IN | EventSet::EDGE_TRIGGERED,
            Self::BecameWritable => EventSet::OUT | EventSet::EDGE_TRIGGERED,
        }
    }
}

/// Events taken per wait; the rest are reported by the next.
const BATCH: usize = 16;

/// The epoll instance.
#[derive(Debug)]
pub struct EventLoop {
    epoll: Epoll,
    events: [EpollEvent; BATCH],
}

impl EventLoop {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, events: [EpollEvent::default(); BATCH] })
    }

    /// Watches `fd`. Fails with `EPERM` for a regular file, which is always ready.
    pub fn add(&self, fd: RawFd, when: When, token: Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(when.events(), token.pack()))
    }

    /// Stops watching `fd`.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    /// Waits until something happens, at most for `patience`, which is at least a millisecond or zero, and returns the
    /// tokens of what happened.
    pub fn wait(&mut self, patience: Option<Duration>) -> io::Result<impl Iterator<Item = Token> + use<>> {
        let timeout = patience.map_or(-1, |patience| patience.as_millis() as i32);
        let count = retried(|| self.epoll.wait(timeout, &mut self.events))?;
        let events = self.events;
        Ok(events.into_iter().take(count).filter_map(|event| Token::unpack(event.data())))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn every_token_survives_the_kernel() {
        let mut tokens = vec![Token::Command, Token::Signal, Token::Vcpu, Token::Reset, Token::Serial, Token::Input];
        tokens.extend([
            Token::OutputReady,
            Token::Metrics,
            Token::HandlerGone,
            Token::Device(0, 0),
            Token::Device(18, 3),
        ]);
        for token in tokens {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
    }

    #[test]
    fn an_eventfd_that_is_never_read_wakes_once_per_write() {
        let mut events = EventLoop::new().unwrap();
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let other = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        events.add(kick.as_raw_fd(), When::BecameReadable, Token::Device(3, 1)).unwrap();
        events.add(other.as_raw_fd(), When::Readable, Token::Command).unwrap();
        for _ in 0..2 {
            kick.write(1).unwrap();
            assert_eq!(events.wait(None).unwrap().collect::<Vec<_>>(), [Token::Device(3, 1)]);
        }
        other.write(1).unwrap();
        assert_eq!(events.wait(None).unwrap().collect::<Vec<_>>(), [Token::Command], "no second report of the kick");
    }
}
