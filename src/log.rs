//! The log: one line a record, to a file, a FIFO or standard error.
//!
//! ```text
//! 2026-01-01T00:00:00.000000000 [anonymous-instance:vmm:WARN:src/event_loop.rs:42] text
//! ```
//!
//! Writing never blocks and never allocates: a destination that is full loses the line, which is
//! counted. What a guest or client can cause goes through [`warn_limited!`](crate::warn_limited).

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{LevelFilter, Log, Metadata, Record};

use crate::config::LoggerConfig;
use crate::metrics::METRICS;

/// Longest line in bytes, the newline included: what a pipe takes whole or not at all (`PIPE_BUF`).
const MAX_LINE: usize = 4096;

struct Logger(Mutex<Settings>);

struct Settings {
    id: String,
    /// The thread that started the log, which has no name. The standard library would set up what Rust's own entry point
    /// does before it said so.
    nameless: Option<usize>,
    /// Standard error if `None`.
    file: Option<File>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

/// The descriptor of the destination, for who cannot take the lock.
static DESTINATION: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

static LOGGER: Logger = Logger(Mutex::new(Settings {
    id: String::new(),
    nameless: None,
    file: None,
    show_level: false,
    show_origin: false,
    module: None,
}));

impl Logger {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        // Settings are replaced whole, so they are whole even if a thread died with the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the log of instance `id` on standard error, at level Info. Later calls only change the id. The calling thread
/// is one without a name.
pub fn init(id: &str) {
    let mut settings = LOGGER.settings();
    settings.id = id.to_owned();
    settings.nameless = Some(this_thread());
    drop(settings);
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Changes what `config` names, and the level, which is Info if it names none.
///
/// # Errors
/// The file cannot be opened, or nobody reads the FIFO; nothing changed then.
pub fn configure(config: &LoggerConfig) -> io::Result<()> {
    let file = config.log_path.as_deref().map(open_append).transpose()?;
    let mut settings = LOGGER.settings();
    if let Some(file) = &file {
        DESTINATION.store(file.as_raw_fd(), Ordering::Relaxed);
    }
    settings.file = file.or(settings.file.take());
    settings.show_level = config.show_level.unwrap_or(settings.show_level);
    settings.show_origin = config.show_log_origin.unwrap_or(settings.show_origin);
    settings.module = config.module.clone().or(settings.module.take());
    drop(settings);
    log::set_max_level(config.level.unwrap_or(LevelFilter::Info));
    Ok(())
}

impl LoggerConfig {
    /// What holds once [`configure`] had one and then the other.
    #[must_use]
    pub fn over(self, before: Self) -> Self {
        Self {
            log_path: self.log_path.or(before.log_path),
            level: self.level,
            show_level: self.show_level.or(before.show_level),
            show_log_origin: self.show_log_origin.or(before.show_log_origin),
            module: self.module.or(before.module),
        }
    }
}

/// Whether the log goes elsewhere than to standard error.
pub fn has_file() -> bool {
    DESTINATION.load(Ordering::Relaxed) != libc::STDERR_FILENO
}

/// Writes a line without locks, for a signal handler: no time, no name. As the log does it waits for nobody.
pub fn write_in_handler(line: &[u8]) {
    let destination = DESTINATION.load(Ordering::Relaxed);
    if destination == libc::STDERR_FILENO && !stderr_takes_more() {
        return;
    }
    // SAFETY: `write` is async-signal-safe, and the line is valid for reading. Nobody is left to be told of an error.
    unsafe { libc::write(destination, line.as_ptr().cast(), line.len()) };
}

/// Logs what the process ends with. Where the lock is taken, maybe by this thread, which panicked in the middle of a line,
/// it is a line without time and name.
pub fn last_words(words: fmt::Arguments<'_>) {
    if LOGGER.0.try_lock().is_ok() {
        return log::error!("{words}");
    }
    let mut line = Line::default();
    line.finish(words);
    write_in_handler(line.bytes());
}

/// Opens a file or FIFO for appending without ever blocking; a file is made if there is none.
///
/// # Errors
/// As `open(2)`; ENXIO for a FIFO that nobody reads.
pub fn open_append(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let settings = self.settings();
        let path = record.module_path().unwrap_or_default();
        if !self.enabled(record.metadata()) || !settings.module.as_ref().is_none_or(|module| path.starts_with(module)) {
            return;
        }
        let mut line = Line::default();
        line.format(&settings, record, SystemTime::now());
        let written = match &settings.file {
            Some(file) => io::Write::write(&mut &*file, line.bytes()),
            None => write_stderr(line.bytes()),
        };
        if written.is_err() {
            METRICS.logger.missed_log_count.inc();
        }
    }

    fn flush(&self) {}
}

/// Writes to standard error unless that would block. Its file description is shared with other
/// processes, so it must not be made non-blocking.
fn write_stderr(line: &[u8]) -> io::Result<usize> {
    if !stderr_takes_more() {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    // SAFETY: the descriptor is only borrowed: `ManuallyDrop` keeps it from being closed.
    let stderr = ManuallyDrop::new(unsafe { File::from_raw_fd(io::stderr().as_raw_fd()) });
    io::Write::write(&mut &*stderr, line)
}

/// Whether a write to standard error would not block. Async-signal-safe.
fn stderr_takes_more() -> bool {
    let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: `poll` is one valid pollfd for the duration of the call.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLOUT != 0
}

fn this_thread() -> usize {
    // SAFETY: it only says which thread calls it.
    unsafe { libc::pthread_self() as usize }
}

/// One line on the stack; what does not fit is cut off.
struct Line {
    buffer: [u8; MAX_LINE],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { buffer: [0; MAX_LINE], length: 0 }
    }
}

impl Line {
    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.length]
    }

    fn format(&mut self, settings: &Settings, record: &Record<'_>, time: SystemTime) {
        let thread = (settings.nameless != Some(this_thread())).then(std::thread::current);
        let thread = thread.as_ref().and_then(Thread::name).unwrap_or("-");
        // It fails where the line is full: then the rest is cut off.
        let _ = write!(self, "{} [{}:{}", Utc(time), settings.id, thread);
        if settings.show_level {
            let _ = write!(self, ":{}", record.level());
        }
        if settings.show_origin {
            let _ = write!(self, ":{}:{}", record.file().unwrap_or("?"), record.line().unwrap_or(0));
        }
        let _ = self.write_str("] ");
        self.finish(*record.args());
    }

    /// Adds the last of it, and its end.
    fn finish(&mut self, words: fmt::Arguments<'_>) {
        let _ = self.write_fmt(words);
        self.buffer[self.length] = b'\n';
        self.length += 1;
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // The last place is the newline's.
            if self.length + 1 == MAX_LINE {
                return Err(fmt::Error);
            }
            // One record is one line, whatever it quotes.
            self.buffer[self.length] = if byte.is_ascii_control() { b'?' } else { byte };
            self.length += 1;
        }
        Ok(())
    }
}

/// A time as `2026-01-31T23:59:59.000000000`, in UTC.
struct Utc(SystemTime);

impl fmt::Display for Utc {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        // Count from 1 March of year 0, so that the leap day is the last of its year; 400 years
        // have 146,097 days.
        let day = days + 719_468;
        let (era, day) = (day / 146_097, day % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        // From March on, months have 31, 30, 31, 30, 31 days, twice and a bit.
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let (year, hour, minute) = (400 * era + year + next_year, second / 3600, second / 60 % 60);
        let (second, nanos) = (second % 60, since.subsec_nanos());
        write!(formatter, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}")
    }
}

/// Lets a few lines through in each period, per call site.
#[derive(Debug, Default)]
pub struct RateLimit {
    /// The period, counted from the first use of any limit, in the upper half; lines in the lower.
    state: AtomicU64,
}

/// Lines let through a period.
const BURST: u32 = 10;
/// The period.
const PERIOD: Duration = Duration::from_secs(5);

impl RateLimit {
    /// Nothing used up.
    pub const fn new() -> Self {
        Self { state: AtomicU64::new(0) }
    }

    /// Whether a line may go out; if so, how many did not since the last period with one.
    pub fn admit(&self) -> Option<u32> {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let periods = START.get_or_init(Instant::now).elapsed().as_secs() / PERIOD.as_secs();
        let admitted = self.admit_in(u32::try_from(periods).unwrap_or(u32::MAX));
        if admitted.is_none() {
            METRICS.logger.rate_limited_log_count.inc();
        }
        admitted
    }

    fn admit_in(&self, period: u32) -> Option<u32> {
        let next = |state: u64| {
            let (last, lines) = ((state >> 32) as u32, state as u32);
            let lines = if last == period { lines.saturating_add(1) } else { 1 };
            u64::from(period) << 32 | u64::from(lines)
        };
        let before = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| Some(next(state)));
        let (last, lines) = before.map(|state| ((state >> 32) as u32, state as u32)).unwrap_or_default();
        match last == period {
            true if lines >= BURST => None,
            true => Some(0),
            false => Some(lines.saturating_sub(BURST)),
        }
    }
}

/// Logs a warning, at most ten in five seconds from one call site: for what a guest or a client can
/// cause. The first line after a silence says how many were left out.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::log::RateLimit = $crate::log::RateLimit::new();
        if ::log::log_enabled!(::log::Level::Warn) && let Some(missed) = LIMIT.admit() {
            if missed > 0 {
                ::log::warn!("{missed} lines like the next were left out");
            }
            ::log::warn!($($arg)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings { id: "vm-1".into(), nameless: None, file: None, show_level: true, show_origin: true, module: None }
    }

    fn line(settings: &Settings, args: fmt::Arguments<'_>) -> String {
        let mut line = Line::default();
        let record = Record::builder().args(args).level(log::Level::Warn).file(Some("src/x.rs")).line(Some(7)).build();
        line.format(settings, &record, UNIX_EPOCH + Duration::new(1_767_225_599, 5));
        String::from_utf8_lossy(line.bytes()).into_owned()
    }

    #[test]
    fn a_line_has_time_instance_thread_level_origin_and_text() {
        let thread = std::thread::current().name().unwrap_or("-").to_owned();
        let text = line(&settings(), format_args!("hi {}", 1));
        assert_eq!(text, format!("2025-12-31T23:59:59.000000005 [vm-1:{thread}:WARN:src/x.rs:7] hi 1\n"));
        let plain = Settings { show_level: false, show_origin: false, ..settings() };
        assert!(line(&plain, format_args!("hi")).ends_with(&format!("[vm-1:{thread}] hi\n")));
        let nameless = Settings { nameless: Some(this_thread()), ..plain };
        assert!(line(&nameless, format_args!("hi")).ends_with("[vm-1:-] hi\n"));
    }

    #[test]
    fn a_record_cannot_make_a_second_line_or_a_line_too_long() {
        let text = line(&settings(), format_args!("a\nb\x1b[31m{}", "x".repeat(2 * MAX_LINE)));
        assert!(text.contains("a?b?[31mxxx"));
        assert_eq!(text.len(), MAX_LINE);
        assert_eq!(text.matches('\n').count(), 1);
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_709_164_800, "2024-02-29T00:00:00"),
            (4_107_542_399, "2100-02-28T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
            (1_767_225_600, "2026-01-01T00:00:00"),
        ] {
            let text = Utc(UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
            assert_eq!(text, format!("{date}.000000000"));
        }
    }

    #[test]
    fn a_noisy_place_is_cut_short_and_says_so_later() {
        let limit = RateLimit::new();
        let admitted: Vec<_> = (0..25).map(|_| limit.admit_in(3)).collect();
        assert_eq!(admitted.iter().flatten().count(), BURST as usize);
        assert_eq!(admitted[0], Some(0));
        assert_eq!(limit.admit_in(4), Some(15));
        assert_eq!(limit.admit_in(4), Some(0));
        assert_eq!(limit.admit_in(9), Some(0));
    }

    #[test]
    fn a_bad_destination_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = LoggerConfig {
            log_path: Some(dir.path().join("missing/log")),
            show_level: Some(true),
            ..Default::default()
        };
        assert!(configure(&config).is_err());
        assert!(!LOGGER.settings().show_level);
    }
}
