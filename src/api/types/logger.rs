//! PUT /logger.

use std::path::PathBuf;

use log::LevelFilter;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevel(pub LevelFilter);

/// The names of levels; the first of a level is the one that is shown.
const LEVELS: [(&str, LevelFilter); 7] = [
    ("Off", LevelFilter::Off),
    ("Error", LevelFilter::Error),
    ("Warning", LevelFilter::Warn),
    ("Warn", LevelFilter::Warn),
    ("Info", LevelFilter::Info),
    ("Debug", LevelFilter::Debug),
    ("Trace", LevelFilter::Trace),
];

impl LogLevel {
    /// The level of that name, in any letter case.
    pub fn from_name(name: &str) -> Option<LevelFilter> {
        LEVELS.into_iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, level)| level)
    }
}

impl Serialize for LogLevel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        LEVELS.iter().find(|(_, level)| *level == self.0).map(|(name, _)| name).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::from_name(&name)
            .map(Self)
            .ok_or_else(|| D::Error::unknown_variant(&name, &["Off", "Error", "Warning", "Info", "Debug", "Trace"]))
    }
}
