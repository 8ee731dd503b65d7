//! The host's side of the serial port: where output goes, where input comes from.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::TokenBucketConfig;
use crate::devices::serial::{OUTPUT_CAPACITY, Serial};
use crate::devices::virtio::rate_limiter::TokenBucket;
use crate::event_loop::{EventLoop, Token, When};
use crate::metrics::METRICS;
use crate::os::poll;

/// Bytes moved per call: what a pipe that polls as writable takes without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// Chunks moved at a time: what the UART holds, and what is pending. What goes beyond that came meanwhile, from vCPUs
/// that may be faster than the destination for ever.
const TURN: usize = OUTPUT_CAPACITY.div_ceil(CHUNK) + 1;
/// How long the end waits for the destination.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Settings of the terminal before it was made raw; put back at the end, whatever the end.
static COOKED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Destination and source of the serial port.
#[derive(Debug)]
pub struct Console {
    /// `None`: standard output.
    file: Option<File>,
    limiter: Option<TokenBucket>,
    /// The limiter's time zero.
    opened: Instant,
    /// Taken from the guest but not yet by the destination.
    pending: Vec<u8>,
    /// The destination is watched for room.
    output_watched: bool,
    /// Standard input, except in tests.
    input_fd: RawFd,
    input: Input,
}

/// Standard input.
#[derive(Debug, PartialEq, Eq)]
enum Input {
    /// Not the guest's, or ended.
    None,
    /// Watched by the event loop.
    Watched,
    /// The UART is full: not watched, so that a flood waits in the kernel.
    Waiting,
}

impl Console {
    /// A console that writes to `file`, or to standard output if `None`; what is over `limit` is
    /// dropped.
    pub fn new(file: Option<File>, limit: Option<&TokenBucketConfig>) -> Self {
        let opened = Instant::now();
        let limiter = limit.map(|config| TokenBucket::new(config, 0));
        let (pending, input_fd) = (Vec::new(), libc::STDIN_FILENO);
        Self { file, limiter, opened, pending, output_watched: false, input_fd, input: Input::None }
    }

    /// Gives the guest standard input, unless the console goes to a file. A terminal in the
    /// foreground becomes raw: its keys, Ctrl-C too, belong to the guest.
    pub fn open_input(&mut self, events: &EventLoop) {
        if self.file.is_some() {
            return;
        }
        if stdio(self.input_fd).is_terminal() && !make_raw() {
            return;
        }
        // Closed, `/dev/null` and regular files cannot be watched: they are no input.
        if events.add(self.input_fd, When::Readable, Token::Input).is_ok() {
            self.input = Input::Watched;
        }
    }

    /// Moves the guest's output to its destination, as far as that takes it without blocking. After a turn the event
    /// loop has others to serve; the UART calls it back.
    pub fn write_output(&mut self, serial: &Mutex<Serial>, events: &EventLoop) {
        for _ in 0..TURN {
            if self.pending.is_empty() && !self.fetch(serial) {
                return;
            }
            match self.write_some() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.watch_output(events);
                    return;
                }
                // A reader that went away or a full disk: the guest must not notice.
                Err(_) => {
                    METRICS.uart.missed_write_count.add(self.pending.len() as u64);
                    self.pending.clear();
                }
            }
        }
        // The rest has another turn.
        lock(serial).wake_vmm();
    }

    /// Reads standard input and offers it to the guest.
    pub fn read_input(&mut self, serial: &Mutex<Serial>, events: &EventLoop) {
        let mut buffer = [0; 64];
        let room = lock(serial).input_room().min(buffer.len());
        if room == 0 {
            self.pause_input(serial, events);
            return;
        }
        match stdio(self.input_fd).read(&mut buffer[..room]) {
            Ok(0) => self.close_input(events),
            Ok(count) => {
                METRICS.uart.read_count.add(count as u64);
                lock(serial).offer_input(&buffer[..count]);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.close_input(events),
        }
    }

    /// The guest has read: watch standard input again.
    pub fn resume_input(&mut self, events: &EventLoop) {
        if self.input == Input::Waiting && events.add(self.input_fd, When::Readable, Token::Input).is_ok() {
            self.input = Input::Watched;
        }
    }

    /// Takes what is left at the end, and not what vCPUs that still run add to it. What the destination does not take
    /// within [`LAST_WAIT`] is lost.
    pub fn finish(&mut self, serial: &Mutex<Serial>) {
        let deadline = Instant::now() + LAST_WAIT;
        for _ in 0..TURN {
            if self.pending.is_empty() && !self.fetch(serial) {
                return;
            }
            while !self.pending.is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !poll_out(self.fd(), left) || self.write_some().is_err() {
                    return;
                }
            }
        }
    }

    /// Fills `pending` from the UART; false when there is nothing. What is over the limit is taken
    /// and dropped, so that the guest does not wait for it.
    fn fetch(&mut self, serial: &Mutex<Serial>) -> bool {
        self.pending.resize(CHUNK, 0);
        let (count, lost) = {
            let mut serial = lock(serial);
            (serial.take_output(&mut self.pending), serial.take_lost())
        };
        self.pending.truncate(count);
        METRICS.uart.missed_write_count.add(lost);
        if let Some(limiter) = &mut self.limiter {
            let now = u64::try_from(self.opened.elapsed().as_nanos()).unwrap_or(u64::MAX);
            if count > 0 && !limiter.admit(count as u64, now) {
                METRICS.uart.rate_limiter_dropped_bytes.add(count as u64);
                self.pending.clear();
            }
        }
        count > 0
    }

    /// One write of what is pending, if anything is. Fails with `WouldBlock` rather than to block.
    fn write_some(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if !poll_out(self.fd(), Duration::ZERO) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let written = match stdio(self.fd()).write(&self.pending) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        };
        METRICS.uart.write_count.add(written as u64);
        self.pending.drain(..written);
        Ok(())
    }

    fn watch_output(&mut self, events: &EventLoop) {
        // Edge-triggered: registered once, reported each time there is room again. What cannot be
        // watched is a regular file, which never blocks.
        if !self.output_watched {
            self.output_watched = events.add(self.fd(), When::BecameWritable, Token::OutputReady).is_ok();
        }
    }

    fn pause_input(&mut self, serial: &Mutex<Serial>, events: &EventLoop) {
        if events.remove(self.input_fd).is_ok() {
            self.input = Input::Waiting;
        }
        // From here the UART tells when it has room; it may have got some meanwhile.
        if lock(serial).want_input() {
            self.resume_input(events);
        }
    }

    fn close_input(&mut self, events: &EventLoop) {
        let _ = events.remove(self.input_fd);
        self.input = Input::None;
    }

    fn fd(&self) -> RawFd {
        self.file.as_ref().map_or(libc::STDOUT_FILENO, AsRawFd::as_raw_fd)
    }
}

fn lock(serial: &Mutex<Serial>) -> std::sync::MutexGuard<'_, Serial> {
    serial.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A descriptor that somebody else owns, as a file without a buffer.
fn stdio(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: the descriptor is only borrowed: `ManuallyDrop` keeps it from being closed. One that
    // is not open yields errors.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

/// Whether `fd` takes at least `PIPE_BUF` bytes within `timeout`.
fn poll_out(fd: RawFd, timeout: Duration) -> bool {
    let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    poll(fd, libc::POLLOUT, timeout).unwrap_or(false)
}

/// Makes the terminal on standard input raw. False if it is not ours to use: a background process
/// that changed it would be stopped.
fn make_raw() -> bool {
    // SAFETY: plain queries; `termios` is valid when all-zero and filled by `tcgetattr`.
    unsafe {
        if libc::tcgetpgrp(libc::STDIN_FILENO) != libc::getpgrp() {
            return false;
        }
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(libc::STDIN_FILENO, &mut settings) != 0 {
            return false;
        }
        let mut raw = settings;
        libc::cfmakeraw(&mut raw);
        // Output stays cooked: the log shares the terminal with the guest.
        raw.c_oflag = settings.c_oflag;
        *COOKED.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings);
        libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw) == 0
    }
}

/// Leaves the terminal as it was found. Never waits: it runs in signal handlers too.
pub fn restore_terminal() {
    if let Ok(mut cooked) = COOKED.try_lock()
        && let Some(settings) = cooked.take()
    {
        // SAFETY: `settings` came from `tcgetattr`; `tcsetattr` is async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &settings) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Seek, SeekFrom};
    use std::os::fd::OwnedFd;
    use std::thread;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    const DATA: u16 = 0;
    const LSR: u16 = 5;
    const LSR_DATA_READY: u8 = 1;
    const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

    fn serial() -> Mutex<Serial> {
        Mutex::new(Serial::new(Box::new(|| ()), EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    fn console(limit: Option<&TokenBucketConfig>) -> (PipeReader, Console) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Console::new(Some(File::from(OwnedFd::from(writer))), limit))
    }

    /// A console whose destination takes a chunk when the one before was read.
    fn narrow_console() -> (PipeReader, Console) {
        let (reader, console) = console(None);
        // SAFETY: takes no memory.
        assert_eq!(unsafe { libc::fcntl(console.fd(), libc::F_SETPIPE_SZ, CHUNK as i32) }, CHUNK as i32);
        (reader, console)
    }

    fn is_whole(read: &[u8]) -> bool {
        read.iter().enumerate().all(|(index, byte)| *byte == (index % 251) as u8)
    }

    /// Writes as a driver that heeds the line status, at most `count` bytes; returns how many.
    fn write(serial: &Mutex<Serial>, first: usize, count: usize) -> usize {
        let mut serial = lock(serial);
        let mut written = 0;
        while written < count && serial.read(LSR) & LSR_TRANSMITTER_EMPTY != 0 {
            serial.write(DATA, ((first + written) % 251) as u8);
            written += 1;
        }
        written
    }

    #[test]
    fn a_destination_that_takes_nothing_holds_up_neither_vmm_nor_loses_the_guests_output() {
        let mut events = EventLoop::new().unwrap();
        let (mut reader, mut console) = console(None);
        let serial = serial();
        let mut written = 0;
        loop {
            let count = write(&serial, written, usize::MAX);
            written += count;
            console.write_output(&serial, &events);
            if count == 0 {
                break;
            }
        }
        assert!(console.pending.len() <= CHUNK && written < 200_000, "bounded, and the guest waits");
        let mut read = Vec::new();
        while read.len() < written {
            let mut buffer = [0; 4096];
            let count = reader.read(&mut buffer).unwrap();
            read.extend_from_slice(&buffer[..count]);
            if read.len() < written && !console.pending.is_empty() {
                assert_eq!(events.wait(None).unwrap().collect::<Vec<_>>(), [Token::OutputReady]);
                console.write_output(&serial, &events);
            }
        }
        assert!(is_whole(&read));
        assert!(write(&serial, 0, 1) == 1, "there is room again");
    }

    #[test]
    fn a_flood_of_input_waits_on_the_host_until_the_guest_has_read_and_none_of_it_is_lost() {
        let mut events = EventLoop::new().unwrap();
        let serial = serial();
        events.add(lock(&serial).wake_fd().as_raw_fd(), When::BecameReadable, Token::Serial).unwrap();
        let (input, mut flood) = io::pipe().unwrap();
        let mut console = Console { input_fd: input.as_raw_fd(), ..Console::new(None, None) };
        console.open_input(&events);
        let bytes: Vec<_> = (0..1000).map(|index| (index % 251) as u8).collect();
        flood.write_all(&bytes).unwrap();
        let mut turn = |console: &mut Console| {
            for _ in 0..10 {
                let tokens: Vec<_> = events.wait(Some(Duration::ZERO)).unwrap().collect();
                for token in &tokens {
                    match token {
                        Token::Serial => console.resume_input(&events),
                        _ => console.read_input(&serial, &events),
                    }
                }
                if tokens.is_empty() {
                    return;
                }
            }
            panic!("it wakes for what there is no room for");
        };
        let mut read = Vec::new();
        while read.len() < bytes.len() {
            turn(&mut console);
            let mut guest = lock(&serial);
            assert_eq!(guest.input_room() == 0, bytes.len() - read.len() >= 64);
            assert_eq!(console.input == Input::Waiting, guest.input_room() == 0);
            while guest.read(LSR) & LSR_DATA_READY != 0 {
                read.push(guest.read(DATA));
            }
        }
        assert!(read == bytes);
        drop(flood);
        turn(&mut console);
        assert_eq!(console.input, Input::None);
    }

    #[test]
    fn a_reader_that_went_away_is_not_noticed_by_the_guest() {
        let events = EventLoop::new().unwrap();
        let (reader, mut console) = console(None);
        drop(reader);
        let serial = serial();
        let before = METRICS.uart.missed_write_count.get();
        for _ in 0..100 {
            assert_eq!(write(&serial, 0, 1000), 1000);
            console.write_output(&serial, &events);
        }
        assert!(METRICS.uart.missed_write_count.get() >= before + 100_000);
    }

    #[test]
    fn output_over_the_limit_is_dropped_and_counted_and_the_guest_goes_on() {
        let events = EventLoop::new().unwrap();
        let limit = TokenBucketConfig { size: 5000, refill_time_ms: 3_600_000, one_time_burst: 0 };
        let (mut reader, mut console) = console(Some(&limit));
        let serial = serial();
        let before = METRICS.uart.rate_limiter_dropped_bytes.get();
        for _ in 0..100 {
            assert_eq!(write(&serial, 0, 1000), 1000);
            console.write_output(&serial, &events);
        }
        assert!(METRICS.uart.rate_limiter_dropped_bytes.get() >= before + 94_000);
        drop(console);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read.len(), 5000);
    }

    #[test]
    fn vcpus_that_refill_the_uart_for_ever_do_not_keep_the_event_loop() {
        let mut events = EventLoop::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut console = Console::new(Some(file.try_clone().unwrap()), None);
        let serial = serial();
        events.add(lock(&serial).wake_fd().as_raw_fd(), When::BecameReadable, Token::Serial).unwrap();
        let (written, mut longest) = (Mutex::new(0), 0);
        let total = 4 << 20;
        let refill = || {
            loop {
                let mut written = written.lock().unwrap();
                *written += write(&serial, *written, total - *written);
                if *written == total {
                    break;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(refill);
            }
            let mut before = 0;
            while before < total as u64 {
                assert_eq!(events.wait(None).unwrap().collect::<Vec<_>>(), [Token::Serial]);
                console.write_output(&serial, &events);
                let after = file.metadata().unwrap().len();
                longest = longest.max(after - before);
                before = after;
            }
        });
        assert!(longest <= (TURN * CHUNK) as u64, "{longest} bytes in one turn");
        let mut read = Vec::new();
        (&file).seek(SeekFrom::Start(0)).unwrap();
        (&file).read_to_end(&mut read).unwrap();
        assert!(read.len() == total && is_whole(&read));
    }

    #[test]
    fn the_end_brings_out_all_that_was_written_before_and_not_what_vcpus_still_write() {
        let (mut reader, mut console) = narrow_console();
        let serial = serial();
        let before = write(&serial, 0, usize::MAX);
        let read = thread::scope(|scope| {
            let vcpus = scope.spawn(|| {
                let (mut written, mut read) = (before, Vec::new());
                loop {
                    // It is full again before the console finds room.
                    written += write(&serial, written, (1 << 20) - written);
                    let mut chunk = [0; CHUNK];
                    match reader.read(&mut chunk).unwrap() {
                        0 => return read,
                        count => read.extend_from_slice(&chunk[..count]),
                    }
                }
            });
            console.finish(&serial);
            drop(console);
            vcpus.join().unwrap()
        });
        assert!((before..=OUTPUT_CAPACITY + CHUNK).contains(&read.len()), "{}", read.len());
        assert!(is_whole(&read));
    }

    #[test]
    fn a_reader_that_takes_a_little_now_and_then_does_not_put_off_the_end() {
        let events = EventLoop::new().unwrap();
        let (mut reader, mut console) = narrow_console();
        let serial = serial();
        let mut written = 0;
        while let count @ 1.. = write(&serial, written, usize::MAX) {
            written += count;
            console.write_output(&serial, &events);
        }
        let reader = thread::spawn(move || {
            let (mut chunk, mut read) = ([0; CHUNK], 0);
            loop {
                thread::sleep(LAST_WAIT / 4);
                match reader.read(&mut chunk).unwrap() {
                    0 => return read,
                    count => read += count,
                }
            }
        });
        console.finish(&serial);
        drop(console);
        let read = reader.join().unwrap();
        assert!(read < written, "all {written} bytes came out, however long it took");
    }
}
