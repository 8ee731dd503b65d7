//! What is counted.
//!
//! A metric is declared once, with its meaning, in [`groups!`] below; from that come the JSON line
//! of the metrics file ([`JsonLines`]), which holds what was counted since the line before, and
//! the OpenMetrics text of GET /metrics ([`openmetrics`]), which holds totals.

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
    /// The total, or the last value.
    fn total(&self) -> u64;
    /// What the next line of the metrics file says.
    fn take(&self) -> u64;
}

impl Metric for Counter {
    fn total(&self) -> u64 {
        self.get()
    }

    fn take(&self) -> u64 {
        let total = self.get();
        total.wrapping_sub(self.written.swap(total, Ordering::Relaxed))
    }
}

impl Metric for Gauge {
    fn total(&self) -> u64 {
        self.get()
    }

    fn take(&self) -> u64 {
        self.get()
    }
}

/// One metric of a group.
struct Field {
    name: &'static str,
    help: &'static str,
    /// OpenMetrics: the type, and the suffix of a sample's name.
    kind: (&'static str, &'static str),
}

/// The metrics of a group, a line for each: name, type, meaning. Text, because a table of references would have to be
/// relocated at every start.
#[derive(Clone, Copy)]
struct Fields(&'static str);

impl Fields {
    fn iter(self) -> impl Iterator<Item = Field> {
        self.0.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ' ');
            let (name, kind, help) = (parts.next()?, parts.next()?, parts.next()?);
            let kind = if kind == "Counter" { ("counter", "_total") } else { ("gauge", "") };
            Some(Field { name, help, kind })
        })
    }
}

/// A group of metrics, as it is shown.
trait Group: Default {
    const FIELDS: Fields;
    fn totals(&self) -> Vec<u64>;
    fn take(&self) -> Vec<u64>;
}

/// Declares groups of metrics; what the visitors below need comes from the declaration.
macro_rules! groups {
    ($($(#[doc = $about:literal])+ $group:ident { $($(#[doc = $help:literal])+ $field:ident: $kind:ident,)+ })+) => { $(
        $(#[doc = $about])+
        #[derive(Debug, Default)]
        pub struct $group { $($(#[doc = $help])+ pub $field: $kind,)+ }

        impl $group {
            /// All metrics at zero.
            pub const fn new() -> Self {
                Self { $($field: $kind::new(),)+ }
            }
        }

        impl Group for $group {
            // A documentation comment begins with a space.
            const FIELDS: Fields =
                Fields(concat!($(stringify!($field), " ", stringify!($kind), $($help,)+ "\n"),+));

            fn totals(&self) -> Vec<u64> {
                vec![$(self.$field.total()),+]
            }

            fn take(&self) -> Vec<u64> {
                vec![$(self.$field.take()),+]
            }
        }
    )+ };
}

mod groups;
pub use groups::*;

/// Declares [`Metrics`]: the groups there is one of.
macro_rules! metrics {
    ($($name:ident: $group:ident,)+) => {
        /// Every metric but those of drives and network interfaces.
        #[derive(Debug)]
        #[expect(missing_docs, reason = "the types say it")]
        pub struct Metrics { $(pub $name: $group,)+ }

        /// The metrics of this process.
        pub static METRICS: Metrics = Metrics { $($name: $group::new(),)+ };

        impl Metrics {
            /// Calls `visit` with each group: its name, its fields, their values as `read` gets them.
            fn visit(&self, read: Read, mut visit: impl FnMut(&'static str, Fields, Vec<u64>)) {
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
    mmds: Mmds,
    patch_api_requests: PatchApiRequests,
    put_api_requests: PutApiRequests,
    sandbox: Sandbox,
    snapshot: Snapshot,
    uart: Uart,
    vcpu: Vcpu,
    vmm: Vmm,
    vsock: Vsock,
}

/// How a visitor reads a metric.
#[derive(Clone, Copy)]
enum Read {
    Total,
    Take,
}

/// The metrics of all devices of a kind, in the order the devices appeared.
struct PerDevice<G> {
    /// Group in the JSON, of all devices; with an underscore and the id, of one.
    group: &'static str,
    /// What OpenMetrics calls the id.
    label: &'static str,
    devices: Mutex<Vec<(String, Arc<G>)>>,
}

static DRIVES: PerDevice<Block> = PerDevice::new("block", "drive_id");
static INTERFACES: PerDevice<Net> = PerDevice::new("net", "iface_id");

/// The metrics of drive `id`; the same ones if it has them already.
pub fn register_block(id: &str) -> Arc<Block> {
    DRIVES.register(id)
}

/// The metrics of interface `id`; the same ones if it has them already.
pub fn register_net(id: &str) -> Arc<Net> {
    INTERFACES.register(id)
}

impl<G: Group> PerDevice<G> {
    const fn new(group: &'static str, label: &'static str) -> Self {
        Self { group, label, devices: Mutex::new(Vec::new()) }
    }

    fn devices(&self) -> MutexGuard<'_, Vec<(String, Arc<G>)>> {
        // A list of counters is whole whatever happened to the thread that held it.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, id: &str) -> Arc<G> {
        let mut devices = self.devices();
        if let Some((_, metrics)) = devices.iter().find(|(known, _)| known == id) {
            return Arc::clone(metrics);
        }
        let metrics = Arc::new(G::default());
        devices.push((id.to_owned(), Arc::clone(&metrics)));
        metrics
    }

    fn openmetrics(&self, text: &mut String) {
        let (group, label) = (self.group, self.label);
        let devices: Vec<_> = self.devices().iter().map(|(id, metrics)| (id.clone(), metrics.totals())).collect();
        for (index, field) in G::FIELDS.iter().enumerate() {
            family(text, group, &field);
            for (id, totals) in &devices {
                let (name, suffix, total) = (field.name, field.kind.1, totals[index]);
                let _ = writeln!(text, "vesicle_{group}_{name}{suffix}{{{label}=\"{id}\"}} {total}");
            }
        }
    }

    /// A group for each device, and one for all of them together.
    fn json(&self, line: &mut String) {
        let mut sums = G::default().totals();
        for (id, metrics) in self.devices().iter() {
            let values = metrics.take();
            json_group(line, &format!("{}_{id}", self.group), G::FIELDS, &values);
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        json_group(line, self.group, G::FIELDS, &sums);
    }
}

/// The heading of a metric. Writing to a string cannot fail.
fn family(text: &mut String, group: &str, field: &Field) {
    let (kind, _) = field.kind;
    let (name, help) = (field.name, field.help);
    let _ = writeln!(text, "# TYPE vesicle_{group}_{name} {kind}\n# HELP vesicle_{group}_{name} {help}");
}

/// Every metric in the OpenMetrics text format 1.0: totals since the process started.
pub fn openmetrics() -> String {
    let mut text = String::with_capacity(12 << 10);
    METRICS.visit(Read::Total, |group, fields, totals| {
        for (field, total) in fields.iter().zip(totals) {
            family(&mut text, group, &field);
            let _ = writeln!(text, "vesicle_{group}_{}{} {total}", field.name, field.kind.1);
        }
    });
    DRIVES.openmetrics(&mut text);
    INTERFACES.openmetrics(&mut text);
    text.push_str("# EOF\n");
    text
}

/// The media type of [`openmetrics`].
pub const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics file.
#[derive(Debug)]
pub struct JsonLines {
    file: std::fs::File,
    /// What every line holds after its timestamp.
    prefix: String,
    /// What is left of a line for which a pipe had no room: it goes out before the next.
    rest: Vec<u8>,
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
        Ok(Self { file, prefix, rest: Vec::new() })
    }

    /// Writes a line: what was counted since the one before.
    ///
    /// # Errors
    /// There was no room for all of it, and it is finished next time; or nobody reads any more. Either
    /// way it is counted as missed.
    pub fn write(&mut self) -> io::Result<()> {
        let written = self.write_rest().and_then(|()| {
            self.rest = json_line(&self.prefix).into_bytes();
            self.write_rest()
        });
        if let Err(error) = &written {
            METRICS.logger.missed_metrics_count.inc();
            if error.kind() != io::ErrorKind::WouldBlock {
                // A new reader must not start with half a line.
                self.rest.clear();
            }
        }
        written
    }

    fn write_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            let written = self.file.write(&self.rest)?;
            self.rest.drain(..written);
        }
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
    METRICS.visit(Read::Take, |group, fields, values| json_group(&mut line, group, fields, &values));
    DRIVES.json(&mut line);
    INTERFACES.json(&mut line);
    line.push_str("}\n");
    line
}

fn json_group(line: &mut String, group: &str, fields: Fields, values: &[u64]) {
    // Writing to a string cannot fail.
    let _ = write!(line, ",\"{group}\":{{");
    for (index, (field, value)) in fields.iter().zip(values).enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(line, "{comma}\"{}\":{value}", field.name);
    }
    line.push('}');
}

#[cfg(test)]
mod tests;
