//! What the process gives up.

use std::path::PathBuf;

/// Which system calls threads may make.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SeccompConfig {
    /// Those of the filters that were built in.
    #[default]
    BuiltIn,
    /// Those of the filters in this file.
    File(PathBuf),
    /// All.
    Off,
}

/// A path that stays usable, with what is below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedPath {
    /// A file or directory.
    pub path: PathBuf,
    /// Not only for reading.
    pub write: bool,
}

impl AllowedPath {
    /// From `PATH`, `PATH:ro` or `PATH:rw`; `None` if there is no path in it.
    pub fn parse(text: &str) -> Option<Self> {
        let (path, write) = match text.rsplit_once(':') {
            Some((path, "ro")) => (path, false),
            Some((path, "rw")) => (path, true),
            _ => (text, true),
        };
        (!path.is_empty()).then(|| Self { path: path.into(), write })
    }
}

/// Landlock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LandlockConfig {
    /// The least ABI of the host's kernel that will do.
    pub least_abi: u8,
    /// If there are any, nothing else can be opened from the start, save what the command line names and the devices
    /// that a microVM needs.
    pub allow: Vec<AllowedPath>,
}

impl Default for LandlockConfig {
    fn default() -> Self {
        Self { least_abi: 1, allow: Vec::new() }
    }
}

/// The confinement of a process by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxConfig {
    /// System-call filters.
    pub seccomp: SeccompConfig,
    /// Landlock; `None` without it.
    pub landlock: Option<LandlockConfig>,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self { seccomp: SeccompConfig::BuiltIn, landlock: Some(LandlockConfig::default()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowed_path_says_what_for() {
        let allowed = |path: &str, write| Some(AllowedPath { path: path.into(), write });
        assert_eq!(AllowedPath::parse("/srv/a"), allowed("/srv/a", true));
        assert_eq!(AllowedPath::parse("/srv/a:rw"), allowed("/srv/a", true));
        assert_eq!(AllowedPath::parse("/srv/a:ro"), allowed("/srv/a", false));
        assert_eq!(AllowedPath::parse("/srv/a:b"), allowed("/srv/a:b", true));
        assert_eq!(AllowedPath::parse("/srv/a:ro:rw"), allowed("/srv/a:ro", true));
        assert_eq!(AllowedPath::parse(""), None);
        assert_eq!(AllowedPath::parse(":ro"), None);
    }
}
