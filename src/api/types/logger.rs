//! PUT /logger.

use std::path::PathBuf;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

/// PUT /logger.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO.
    pub log_path: Option<PathBuf>,
    /// Least severe level that is written.
    pub level: Option<LogLevel>,
    /// Write the level.
    pub show_level: Option<bool>,
    /// Write file and line.
    pub show_log_origin: Option<bool>,
    /// Only records whose module path starts so.
    pub module: Option<String>,
}

/// See [`Logger::level`]; read in any letter case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names of the log crate")]
pub enum LogLevel {
    Off,
    Error,
    Warning,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// The level of that name, in any letter case; `Warn` is `Warning`.
    pub fn from_name(name: &str) -> Option<Self> {
        let levels = [
            ("off", Self::Off),
            ("error", Self::Error),
            ("warning", Self::Warning),
            ("warn", Self::Warning),
            ("info", Self::Info),
            ("debug", Self::Debug),
            ("trace", Self::Trace),
        ];
        levels.into_iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, level)| level)
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::from_name(&name)
            .ok_or_else(|| D::Error::unknown_variant(&name, &["Off", "Error", "Warning", "Info", "Debug", "Trace"]))
    }
}
