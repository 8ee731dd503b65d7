//! What is counted.
//!
//! A metric is declared once, with its meaning, in [`groups!`] below; from that come the JSON line
//! of the metrics file ([`JsonLines`]), which holds what was counted since the line before, and
//! the OpenMetrics text of GET /metrics ([`openmetrics`]), which holds totals.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::MetricsConfig;

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter {
    total: AtomicU64,
    /// What `total` was when the metrics file was last written.
    written: AtomicU64,
}

impl Counter {
    /// A counter at zero.
    pub const fn new() -> Self {
        Self { total: AtomicU64::new(0), written: AtomicU64::new(0) }
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.total.fetch_add(n, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

/// The last value of something measured.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// A gauge at zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a metric is read, whatever its kind.
trait Metric {
    /// OpenMetrics: the type, and the suffix of a sample's name.
    const KIND: (&'static str, &'static str);
    /// The total, or the last value.
    fn total(&self) -> u64;
    /// What the next line of the metrics file says.
    fn take(&self) -> u64;
}

impl Metric for Counter {
    const KIND: (&'static str, &'static str) = ("counter", "_total");

    fn total(&self) -> u64 {
        self.get()
    }

    fn take(&self) -> u64 {
        let total = self.get();
        total.wrapping_sub(self.written.swap(total, Ordering::Relaxed))
    }
}

impl Metric for Gauge {
    const KIND: (&'static str, &'static str) = ("gauge", "");

    fn total(&self) -> u64 {
        self.get()
    }

    fn take(&self) -> u64 {
        self.get()
    }
}

/// One metric of a group: its name in the group, what it means, its kind.
struct Field {
    name: &'static str,
    help: &'static str,
    kind: (&'static str, &'static str),
}

/// Declares groups of metrics; what the visitors below need comes from the declaration.
macro_rules! groups {
    ($($(#[doc = $about:literal])+ $group:ident { $($(#[doc = $help:literal])+ $field:ident: $kind:ident,)+ })+) => { $(
        $(#[doc = $about])+
        #[derive(Debug, Default)]
        pub struct $group { $($(#[doc = $help])+ pub $field: $kind,)+ }

        impl $group {
            const FIELDS: &[Field] = &[$(Field {
                name: stringify!($field),
                help: concat!($($help),+),
                kind: <$kind as Metric>::KIND,
            }),+];

            /// All metrics at zero.
            pub const fn new() -> Self {
                Self { $($field: $kind::new(),)+ }
            }

            fn totals(&self) -> Vec<u64> {
                vec![$(self.$field.total()),+]
            }

            fn take(&self) -> Vec<u64> {
                vec![$(self.$field.take()),+]
            }
        }
    )+ };
}

groups! {
    /// The process's start and its API server.
    ApiServer {
        /// Wall time from the start of the process, as the launcher told it, to the first accept, in microseconds.
        process_startup_time_us: Gauge,
        /// CPU time from the start of the process to the first accept, the launcher's included, in microseconds.
        process_startup_time_cpu_us: Gauge,
        /// Connections refused because too many were open.
        connections_refused: Counter,
    }
    /// GET requests.
    GetApiRequests {
        /// Requests for the instance information.
        instance_info_count: Counter,
        /// Requests for the machine configuration.
        machine_cfg_count: Counter,
        /// Requests for the version.
        vmm_version_count: Counter,
    }
    /// PUT requests.
    PutApiRequests {
        /// Actions asked for.
        actions_count: Counter,
        /// Actions refused.
        actions_fails: Counter,
        /// Boot sources.
        boot_source_count: Counter,
        /// Boot sources refused.
        boot_source_fails: Counter,
        /// Drives.
        drive_count: Counter,
        /// Drives refused.
        drive_fails: Counter,
        /// Log configurations.
        logger_count: Counter,
        /// Log configurations refused.
        logger_fails: Counter,
        /// Machine configurations.
        machine_cfg_count: Counter,
        /// Machine configurations refused.
        machine_cfg_fails: Counter,
        /// Metrics configurations.
        metrics_count: Counter,
        /// Metrics configurations refused.
        metrics_fails: Counter,
        /// Serial configurations.
        serial_count: Counter,
        /// Serial configurations refused.
        serial_fails: Counter,
    }
    /// PATCH requests.
    PatchApiRequests {
        /// Changes to drives.
        drive_count: Counter,
        /// Changes to drives refused.
        drive_fails: Counter,
        /// Changes to the machine configuration.
        machine_cfg_count: Counter,
        /// Changes to the machine configuration refused.
        machine_cfg_fails: Counter,
        /// Pauses and resumes.
        vm_count: Counter,
        /// Pauses and resumes refused.
        vm_fails: Counter,
    }
    /// What clients use that is going away.
    DeprecatedApi {
        /// Requests with a deprecated field.
        deprecated_http_api_calls: Counter,
    }
    /// How long things took, the last time.
    LatenciesUs {
        /// A pause as the client saw it, in microseconds.
        pause_vm: Gauge,
        /// A resume as the client saw it, in microseconds.
        resume_vm: Gauge,
        /// A pause in the vmm thread, in microseconds.
        vmm_pause_vm: Gauge,
        /// A resume in the vmm thread, in microseconds.
        vmm_resume_vm: Gauge,
    }
    /// The log and the metrics file.
    Logger {
        /// Log lines that could not be written.
        missed_log_count: Counter,
        /// Log lines left out because one place logged too often.
        rate_limited_log_count: Counter,
        /// Lines of the metrics file that could not be written.
        missed_metrics_count: Counter,
    }
    /// VM exits.
    Vcpu {
        /// Exits because of an IN instruction.
        exit_io_in: Counter,
        /// Exits because of an OUT instruction.
        exit_io_out: Counter,
        /// Exits because of a read of device memory.
        exit_mmio_read: Counter,
        /// Exits because of a write to device memory.
        exit_mmio_write: Counter,
        /// Exits that could not be handled.
        failures: Counter,
    }
    /// The VMM itself.
    Vmm {
        /// Panics.
        panic_count: Counter,
    }
    /// The serial port.
    Uart {
        /// Errors of the output.
        error_count: Counter,
        /// Reads of no register or of more than one byte.
        missed_read_count: Counter,
        /// Writes to no register or of more than one byte, and bytes that could not be put out.
        missed_write_count: Counter,
        /// Bytes the guest read.
        read_count: Counter,
        /// Bytes the guest wrote.
        write_count: Counter,
        /// Bytes dropped by the rate limiter.
        rate_limiter_dropped_bytes: Counter,
    }
    /// The keyboard controller.
    I8042 {
        /// Errors while raising an interrupt or a reset.
        error_count: Counter,
        /// Reads of no register or of more than one byte.
        missed_read_count: Counter,
        /// Writes to no register or of more than one byte.
        missed_write_count: Counter,
        /// Bytes the guest read.
        read_count: Counter,
        /// Resets the guest asked for.
        reset_count: Counter,
        /// Bytes the guest wrote.
        write_count: Counter,
    }
    /// One drive.
    Block {
        /// Completed reads.
        read_count: Counter,
        /// Bytes read.
        read_bytes: Counter,
        /// Completed writes.
        write_count: Counter,
        /// Bytes written.
        write_bytes: Counter,
        /// Completed flushes.
        flush_count: Counter,
        /// Completed discards and write-zeroes.
        discard_count: Counter,
        /// Requests that ended in an error status.
        execute_fails: Counter,
        /// Times the guest broke the protocol and the device asked for a reset.
        needs_reset: Counter,
        /// Wakes by the guest's notification.
        queue_event_count: Counter,
        /// Times the rate limiter stopped the queue.
        rate_limiter_throttled_events: Counter,
        /// Times the drive's file was replaced.
        update_count: Counter,
    }
}

impl ApiServer {
    /// Sets how long the start took, from clocks the launcher read (`--start-time-us`,
    /// `--start-time-cpu-us`) and CPU time it spent (`--parent-cpu-time-us`), all in microseconds.
    pub fn report_start(&self, start: Option<u64>, start_cpu: Option<u64>, parent_cpu: Option<u64>) {
        if let Some(start) = start {
            self.process_startup_time_us.set(clock_us(libc::CLOCK_MONOTONIC).saturating_sub(start));
        }
        if let Some(start) = start_cpu {
            let spent = clock_us(libc::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(start);
            self.process_startup_time_cpu_us.set(spent.saturating_add(parent_cpu.unwrap_or(0)));
        }
    }
}

fn clock_us(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing; a clock that does not exist leaves it as it is.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1_000
}

/// Declares [`Metrics`]: the groups there is one of.
macro_rules! metrics {
    ($($name:ident: $group:ident,)+) => {
        /// Every metric but those of drives.
        #[derive(Debug)]
        #[expect(missing_docs, reason = "the types say it")]
        pub struct Metrics { $(pub $name: $group,)+ }

        /// The metrics of this process.
        pub static METRICS: Metrics = Metrics { $($name: $group::new(),)+ };

        impl Metrics {
            /// Calls `visit` with each group: its name, its fields, their values as `read` gets them.
            fn visit(&self, read: Read, mut visit: impl FnMut(&'static str, &'static [Field], Vec<u64>)) {
                $(visit(stringify!($name), $group::FIELDS, match read {
                    Read::Total => self.$name.totals(),
                    Read::Take => self.$name.take(),
                });)+
            }
        }
    };
}

metrics! {
    api_server: ApiServer,
    deprecated_api: DeprecatedApi,
    get_api_requests: GetApiRequests,
    i8042: I8042,
    latencies_us: LatenciesUs,
    logger: Logger,
    patch_api_requests: PatchApiRequests,
    put_api_requests: PutApiRequests,
    uart: Uart,
    vcpu: Vcpu,
    vmm: Vmm,
}

/// How a visitor reads a metric.
#[derive(Clone, Copy)]
enum Read {
    Total,
    Take,
}

/// The drives' metrics, in the order the drives appeared.
static DRIVES: Mutex<Vec<(String, Arc<Block>)>> = Mutex::new(Vec::new());

fn drives() -> MutexGuard<'static, Vec<(String, Arc<Block>)>> {
    // A list of counters is whole whatever happened to the thread that held it.
    DRIVES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The metrics of drive `id`; the same ones if it has them already.
pub fn register_block(id: &str) -> Arc<Block> {
    let mut drives = drives();
    if let Some((_, block)) = drives.iter().find(|(known, _)| known == id) {
        return Arc::clone(block);
    }
    let block = Arc::new(Block::new());
    drives.push((id.to_owned(), Arc::clone(&block)));
    block
}

/// Every metric in the OpenMetrics text format 1.0: totals since the process started.
pub fn openmetrics() -> String {
    let mut text = String::with_capacity(12 << 10);
    // Writing to a string cannot fail.
    let family = |text: &mut String, group: &str, field: &Field| {
        let (kind, _) = field.kind;
        let (name, help) = (field.name, field.help.trim_start());
        let _ = writeln!(text, "# TYPE vesicle_{group}_{name} {kind}\n# HELP vesicle_{group}_{name} {help}");
    };
    METRICS.visit(Read::Total, |group, fields, totals| {
        for (field, total) in fields.iter().zip(totals) {
            family(&mut text, group, field);
            let _ = writeln!(text, "vesicle_{group}_{}{} {total}", field.name, field.kind.1);
        }
    });
    let drives: Vec<_> = drives().iter().map(|(id, block)| (id.clone(), block.totals())).collect();
    for (index, field) in Block::FIELDS.iter().enumerate() {
        family(&mut text, "block", field);
        for (id, totals) in &drives {
            let (name, suffix, total) = (field.name, field.kind.1, totals[index]);
            let _ = writeln!(text, "vesicle_block_{name}{suffix}{{drive_id=\"{id}\"}} {total}");
        }
    }
    text.push_str("# EOF\n");
    text
}

/// The media type of [`openmetrics`].
pub const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics file.
#[derive(Debug)]
pub struct JsonLines {
    file: std::fs::File,
    /// What every line starts with after its timestamp.
    prefix: String,
    /// The rest of a line a full pipe took a part of: it goes out before the next.
    rest: VecDeque<u8>,
}

impl JsonLines {
    /// Opens the metrics file of instance `id`.
    ///
    /// # Errors
    /// It cannot be opened; a FIFO that nobody reads is one of the cases.
    pub fn open(config: &MetricsConfig, id: &str) -> io::Result<Self> {
        let file = crate::log::open_append(&config.metrics_path)?;
        let mut prefix = String::new();
        if config.emit_id {
            let _ = write!(prefix, ",\"id\":{}", json_string(id));
        }
        if !config.properties.is_empty() {
            let pairs: Vec<_> =
                config.properties.iter().map(|(key, value)| json_string(key) + ":" + &json_string(value)).collect();
            let _ = write!(prefix, ",\"properties\":{{{}}}", pairs.join(","));
        }
        Ok(Self { file, prefix, rest: VecDeque::new() })
    }

    /// Writes a line: what was counted since the one before.
    ///
    /// # Errors
    /// The line did not fit or could not be written; it is lost, and counted as missed.
    pub fn write(&mut self) -> io::Result<()> {
        self.try_write().inspect_err(|_| METRICS.logger.missed_metrics_count.inc())
    }

    fn try_write(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            let written = self.file.write(self.rest.as_slices().0)?;
            self.rest.drain(..written);
        }
        let line = json_line(&self.prefix);
        let written = self.file.write(line.as_bytes())?;
        self.rest.extend(&line.as_bytes()[written..]);
        Ok(())
    }
}

fn json_string(text: &str) -> String {
    // A string always serialises.
    serde_json::to_string(text).unwrap_or_default()
}

/// `prefix` goes after the timestamp.
fn json_line(prefix: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut line = format!("{{\"utc_timestamp_ms\":{now}{prefix}");
    METRICS.visit(Read::Take, |group, fields, values| json_group(&mut line, group, "", fields, &values));
    let mut sums = vec![0; Block::FIELDS.len()];
    for (id, block) in drives().iter() {
        let values = block.take();
        json_group(&mut line, "block_", id, Block::FIELDS, &values);
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    json_group(&mut line, "block", "", Block::FIELDS, &sums);
    line.push_str("}\n");
    line
}

fn json_group(line: &mut String, group: &str, id: &str, fields: &[Field], values: &[u64]) {
    // Writing to a string cannot fail.
    let _ = write!(line, ",\"{group}{id}\":{{");
    for (index, (field, value)) in fields.iter().zip(values).enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(line, "{comma}\"{}\":{value}", field.name);
    }
    line.push('}');
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn config(path: &std::path::Path) -> MetricsConfig {
        MetricsConfig { metrics_path: path.into(), ..Default::default() }
    }

    #[test]
    fn a_line_says_what_was_counted_since_the_line_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let properties = vec![("team".to_owned(), "a \"b\"".to_owned())];
        let mut file = JsonLines::open(&MetricsConfig { emit_id: true, properties, ..config(&path) }, "vm-1").unwrap();
        let (one, two) = (register_block("lines_one"), register_block("lines_two"));
        for reads in [3, 4, 0] {
            one.read_count.add(reads);
            two.read_count.add(10 * reads);
            file.write().unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let reads = |drive: &str| lines.iter().map(|line| line[drive]["read_count"].as_u64().unwrap()).collect();
        let expected: [Vec<u64>; 2] = [vec![3, 4, 0], vec![30, 40, 0]];
        assert_eq!([reads("block_lines_one"), reads("block_lines_two")], expected);
        let sums: Vec<u64> = reads("block");
        assert!(sums[0] >= 33 && sums[1] >= 44, "{sums:?}");
        assert_eq!(lines[0]["id"], "vm-1");
        assert_eq!(lines[0]["properties"]["team"], "a \"b\"");
        assert!(lines[0]["utc_timestamp_ms"].as_u64().unwrap() > 1_700_000_000_000);
        assert!(text.starts_with("{\"utc_timestamp_ms\":"));
        assert_eq!(one.read_count.get(), 7);
    }

    #[test]
    fn the_text_format_has_every_metric_once_with_its_meaning() {
        let block = register_block("text");
        block.write_bytes.add(512);
        METRICS.latencies_us.vmm_pause_vm.set(77);
        let text = openmetrics();
        assert!(text.ends_with("\n# EOF\n"));
        assert!(text.contains("\nvesicle_block_write_bytes_total{drive_id=\"text\"} 512\n"));
        assert!(text.contains("# TYPE vesicle_latencies_us_vmm_pause_vm gauge\n"));
        assert!(text.contains("\nvesicle_latencies_us_vmm_pause_vm 77\n"));
        assert!(text.contains("# HELP vesicle_vcpu_exit_io_in Exits because of an IN instruction.\n"));
        let mut families: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let count = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), count);
    }

    #[test]
    fn a_fifo_without_reader_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let error = JsonLines::open(&config(&path), "vm").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
    }

    #[test]
    fn a_full_fifo_loses_whole_lines_and_never_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let options = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut reader = options.unwrap();
        let mut file = JsonLines::open(&config(&path), "vm").unwrap();
        let before = METRICS.logger.missed_metrics_count.get();
        while file.write().is_ok() {}
        assert!(METRICS.logger.missed_metrics_count.get() > before);
        let mut text = read_available(&mut reader);
        file.write().unwrap();
        text.push_str(&read_available(&mut reader));
        for line in text.lines() {
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }

    fn read_available(reader: &mut std::fs::File) -> String {
        let mut bytes = Vec::new();
        let error = io::Read::read_to_end(reader, &mut bytes).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        String::from_utf8(bytes).unwrap()
    }

    fn fifo(dir: &std::path::Path) -> std::path::PathBuf {
        let path = dir.join("fifo");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: `name` is a NUL-terminated string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        path
    }
}
