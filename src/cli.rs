//! The command line.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use lexopt::{Arg, Parser};

use crate::api::types::LogLevel;
use crate::config::{AllowedPath, LandlockConfig, LoggerConfig, SandboxConfig, SeccompConfig};
use crate::snapshot::format;

/// Where the API is served if `--api-sock` does not say: where launchers for this API look for it.
pub const DEFAULT_API_SOCK: &str = "/run/firecracker.socket";
/// The instance's name if `--id` does not say.
pub const DEFAULT_ID: &str = "anonymous-instance";
/// Most bytes of an API request's body if `--http-api-max-payload-size` does not say.
pub const DEFAULT_MAX_PAYLOAD: usize = 51_200;

/// Where the API is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiSocket {
    /// At a path.
    Path(PathBuf),
    /// On a listening socket passed in.
    Descriptor(RawFd),
}

/// What the process was started with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Where the API is served; `None` with `--no-api`.
    pub api_sock: Option<ApiSocket>,
    /// `[A-Za-z0-9-]`, 1 to 64 characters.
    pub id: String,
    /// Configure and start the microVM from this file.
    pub config_file: Option<PathBuf>,
    /// Descriptors passed in that the configuration may name.
    pub passed_fds: Vec<RawFd>,
    /// `/dev/kvm`, passed in.
    pub kvm_fd: Option<RawFd>,
    /// `/proc/self`, passed in.
    pub proc_fd: Option<RawFd>,
    /// What the process gives up.
    pub sandbox: SandboxConfig,
    /// The log, as PUT /logger would set it.
    pub logger: LoggerConfig,
    /// The metrics file.
    pub metrics_path: Option<PathBuf>,
    /// Give the guest the boot timer.
    pub boot_timer: bool,
    /// Most bytes of an API request's body.
    pub max_payload: usize,
    /// Most bytes of metadata, as JSON; like `max_payload` if `None`.
    pub mmds_limit: Option<usize>,
    /// Metadata to start with: a JSON file.
    pub metadata: Option<PathBuf>,
    /// Have everything ready for the load of the snapshot with this state file.
    pub prepare: Option<PathBuf>,
    /// The working set that is ready then as well.
    pub working_set_path: Option<PathBuf>,
    /// Monotonic clock when the launcher began to start the process, in microseconds.
    pub start_time_us: Option<u64>,
    /// CPU clock of the process when the launcher executed it, in microseconds.
    pub start_time_cpu_us: Option<u64>,
    /// CPU time the launcher spent before, in microseconds.
    pub parent_cpu_time_us: Option<u64>,
}

impl Options {
    /// What holds without arguments.
    fn unless_said_otherwise() -> Self {
        Self {
            api_sock: Some(ApiSocket::Path(DEFAULT_API_SOCK.into())),
            id: DEFAULT_ID.into(),
            max_payload: DEFAULT_MAX_PAYLOAD,
            ..Self::default()
        }
    }
}

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cli {
    /// Run.
    Run(Box<Options>),
    /// Print this to standard output and exit with status 0.
    Print(String),
    /// Print the format version of this state file and exit with status 0.
    DescribeSnapshot(PathBuf),
}

/// Why the command line is refused (exit status 153).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    /// An argument that is no flag, or none of ours.
    #[error("unknown argument {0:?}; --help lists the flags")]
    Unknown(String),
    /// A flag that takes a value stands at the end.
    #[error("--{flag} needs a value: {flag_value}", flag_value = value_of(.0), flag = .0)]
    MissingValue(String),
    /// A flag that takes no value has one.
    #[error("--{0} takes no value")]
    UnexpectedValue(String),
    /// A value that makes no sense.
    #[error("--{flag} {value:?}: {expected}")]
    BadValue {
        /// Without the hyphens.
        flag: String,
        /// As given.
        value: String,
        /// What would make sense.
        expected: &'static str,
    },
    /// Each takes back what the other asks for.
    #[error("--{0} and --{1} exclude each other")]
    Exclude(&'static str, &'static str),
    /// Which of the two is meant cannot be known.
    #[error("--{0} is given twice")]
    Twice(String),
    /// Without a socket something else must configure the microVM.
    #[error("--no-api needs --config-file")]
    NoApiWithoutConfig,
    /// There is no memory to have pages ready in; a load names its own.
    #[error("--working-set-path needs --prepare")]
    WorkingSetWithoutPrepare,
}

/// A flag: its name, what its value is (empty if it takes none), what it means.
struct Flag(&'static str, &'static str, &'static str);

const FLAGS: &[Flag] = &[
    Flag(
        "api-sock",
        "PATH|fd:N",
        "serve the API on a Unix socket at PATH, or on the listening socket N passed in\n[default: /run/firecracker.socket]",
    ),
    Flag("id", "ID", "name of the instance: 1 to 64 letters, digits and hyphens [default: anonymous-instance]"),
    Flag("config-file", "PATH", "configure the microVM from a JSON file, as GET /vm/config shows it, and start it"),
    Flag("no-api", "", "serve no API; needs --config-file"),
    Flag("pass-fd", "N", "descriptor N was passed in; a configuration may name it fd:N; may be repeated"),
    Flag("log-path", "PATH", "log to a file or FIFO instead of standard error"),
    Flag("level", "LEVEL", "Off, Error, Warning, Info, Debug or Trace [default: Info]"),
    Flag("module", "PREFIX", "log only records of modules whose path starts so"),
    Flag("show-level", "", "write the level in every log line"),
    Flag("show-log-origin", "", "write source file and line in every log line"),
    Flag("metrics-path", "PATH", "write metrics to a file or FIFO, a JSON line every 60 seconds"),
    Flag("boot-timer", "", "log how long the guest took until it wrote to the boot timer"),
    Flag("http-api-max-payload-size", "BYTES", "refuse API requests with a larger body [default: 51200]"),
    Flag(
        "mmds-size-limit",
        "BYTES",
        "refuse metadata that is larger as JSON\n[default: as --http-api-max-payload-size]",
    ),
    Flag("metadata", "PATH", "begin with the metadata in a JSON file"),
    Flag(
        "prepare",
        "PATH",
        "get ready for the load of the snapshot with this state file, whose\nmemory file is where it was written",
    ),
    Flag("working-set-path", "PATH", "with --prepare: have these pages of the snapshot copied that a first run writes"),
    Flag("start-time-us", "US", "for launchers: monotonic clock when the process was being started"),
    Flag("start-time-cpu-us", "US", "for launchers: CPU clock of the process when it was executed"),
    Flag("parent-cpu-time-us", "US", "for launchers: CPU time spent before the process was executed"),
    Flag("kvm-fd", "N", "descriptor N is /dev/kvm, passed in"),
    Flag("proc-fd", "N", "descriptor N is the directory /proc/self, passed in: for jails that have no /proc"),
    Flag("allow-path", "PATH[:ro|rw]", "leave only such paths in reach, besides what is configured; may be repeated"),
    Flag("seccomp-filter", "PATH", "use the system-call filters in a JSON file instead of those built in"),
    Flag("no-seccomp", "", "use no system-call filters: for debugging"),
    Flag("landlock-abi", "N", "refuse to run where the kernel's Landlock is older than ABI N [default: 1]"),
    Flag("no-landlock", "", "do not use Landlock: for hosts that have none"),
    Flag("snapshot-version", "", "print the version of the snapshots' format that is written and read"),
    Flag("describe-snapshot", "PATH", "print the format version of a snapshot's state file"),
    Flag("version", "", "print the version"),
    Flag("help", "", "print this text"),
];

/// Flags that may be given more than once.
const REPEATED: &[&str] = &["pass-fd", "allow-path"];

/// Flags of which only one may be given.
const EXCLUSIVE: &[(&str, &str)] =
    &[("seccomp-filter", "no-seccomp"), ("landlock-abi", "no-landlock"), ("allow-path", "no-landlock")];

fn value_of(flag: &str) -> &'static str {
    FLAGS.iter().find(|known| known.0 == flag).map_or("", |known| known.1)
}

fn help() -> String {
    let mut text = format!(
        "{}\nUsage: vesicle [FLAGS]\n\nA virtual machine monitor that gives one untrusted function its own Linux kernel.\n\n",
        version()
    );
    for Flag(name, value, meaning) in FLAGS {
        let flag = format!("--{name} {value}");
        let gap = if flag.len() > 28 { "\n".to_owned() + &" ".repeat(32) } else { " ".repeat(30 - flag.len()) };
        text += &format!("  {flag}{gap}{}\n", meaning.replace('\n', &("\n".to_owned() + &" ".repeat(32))));
    }
    text + "\nExit status: 0 after a guest reset or shutdown, 1 on failure, 152 for a bad configuration, 153 for bad\narguments.\n"
}

fn version() -> String {
    format!("Vesicle v{}\n", crate::api::VERSION)
}

/// The version of a snapshot's format as `--snapshot-version` and `--describe-snapshot` print it: with
/// the minor and patch numbers that launchers look for.
pub fn snapshot_version(version: u16) -> String {
    format!("v{version}.0.0\n")
}

/// Parses the arguments, the program's name not among them.
///
/// # Errors
/// The first argument that is wrong.
pub fn parse(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Cli, CliError> {
    let mut parser = Parser::from_args(arguments);
    let mut options = Options::unless_said_otherwise();
    let mut seen = [false; FLAGS.len()];
    let mut no_api = false;
    while let Some(name) = next_flag(&mut parser)? {
        let Some(index) = FLAGS.iter().position(|flag| flag.0 == name) else {
            return Err(CliError::Unknown(format!("--{name}")));
        };
        if std::mem::replace(&mut seen[index], true) && !REPEATED.contains(&name.as_str()) {
            return Err(CliError::Twice(name));
        }
        match FLAGS[index] {
            Flag("help", ..) => return Ok(Cli::Print(help())),
            Flag("version", ..) => return Ok(Cli::Print(version())),
            Flag("snapshot-version", ..) => return Ok(Cli::Print(snapshot_version(format::VERSION))),
            Flag(flag @ "describe-snapshot", ..) => {
                return Ok(Cli::DescribeSnapshot(value(&mut parser, flag)?.into()));
            }
            Flag("no-api", ..) => no_api = true,
            Flag(flag, "", _) => set(&mut options, flag),
            Flag(flag, ..) => set_value(&mut options, flag, value(&mut parser, flag)?)?,
        }
        // What is left of `--flag=value` where no value belongs.
        if parser.optional_value().is_some() {
            return Err(CliError::UnexpectedValue(name));
        }
    }
    let given = |flag: &str| FLAGS.iter().zip(seen).any(|(known, seen)| seen && known.0 == flag);
    if let Some((one, other)) = EXCLUSIVE.iter().find(|(one, other)| given(one) && given(other)) {
        return Err(CliError::Exclude(one, other));
    }
    if options.working_set_path.is_some() && options.prepare.is_none() {
        return Err(CliError::WorkingSetWithoutPrepare);
    }
    if no_api {
        if options.config_file.is_none() {
            return Err(CliError::NoApiWithoutConfig);
        }
        options.api_sock = None;
    }
    check_descriptors(&options)?;
    Ok(Cli::Run(Box::new(options)))
}

/// Each is owned by whoever it is meant for, so none can be meant for two.
fn check_descriptors(options: &Options) -> Result<(), CliError> {
    let mut named: Vec<_> = options.passed_fds.iter().map(|fd| ("pass-fd", *fd)).collect();
    named.extend(options.kvm_fd.map(|fd| ("kvm-fd", fd)));
    named.extend(options.proc_fd.map(|fd| ("proc-fd", fd)));
    if let Some(ApiSocket::Descriptor(fd)) = options.api_sock {
        named.push(("api-sock", fd));
    }
    named.sort_by_key(|(_, fd)| *fd);
    match named.windows(2).find(|pair| pair[0].1 == pair[1].1) {
        Some(pair) => Err(bad(pair[1].0, &pair[1].1.to_string(), "is given twice")),
        None => Ok(()),
    }
}

/// The next argument, which must be a long flag; its name.
fn next_flag(parser: &mut Parser) -> Result<Option<String>, CliError> {
    match parser.next() {
        Ok(None) => Ok(None),
        Ok(Some(Arg::Long(name))) => Ok(Some(name.to_owned())),
        Ok(Some(Arg::Short(letter))) => Err(CliError::Unknown(format!("-{letter}"))),
        Ok(Some(Arg::Value(value))) => Err(CliError::Unknown(value.to_string_lossy().into_owned())),
        Err(error) => Err(CliError::Unknown(error.to_string())),
    }
}

fn value(parser: &mut Parser, flag: &'static str) -> Result<String, CliError> {
    let value = parser.value().map_err(|_| CliError::MissingValue(flag.into()))?;
    // Paths are shown again as JSON, which is UTF-8.
    value.into_string().map_err(|value| bad(flag, &value.to_string_lossy(), "must be UTF-8"))
}

fn bad(flag: &str, value: &str, expected: &'static str) -> CliError {
    CliError::BadValue { flag: flag.into(), value: value.into(), expected }
}

/// A flag without a value.
fn set(options: &mut Options, flag: &str) {
    match flag {
        "show-level" => options.logger.show_level = Some(true),
        "show-log-origin" => options.logger.show_log_origin = Some(true),
        "boot-timer" => options.boot_timer = true,
        "no-seccomp" => options.sandbox.seccomp = SeccompConfig::Off,
        "no-landlock" => options.sandbox.landlock = None,
        _ => {}
    }
}

fn set_value(options: &mut Options, flag: &str, value: String) -> Result<(), CliError> {
    let bytes = || value.parse().map_err(|_| bad(flag, &value, "must be a number of bytes"));
    let number = || value.parse().map_err(|_| bad(flag, &value, "must be a number of microseconds"));
    match flag {
        "api-sock" => options.api_sock = Some(api_socket(&value)?),
        "id" => options.id = instance_id(value)?,
        "config-file" => options.config_file = Some(value.into()),
        "pass-fd" => options.passed_fds.push(passed_fd(flag, &value)?),
        "kvm-fd" => options.kvm_fd = Some(passed_fd(flag, &value)?),
        "proc-fd" => options.proc_fd = Some(passed_fd(flag, &value)?),
        "seccomp-filter" => options.sandbox.seccomp = SeccompConfig::File(value.into()),
        "landlock-abi" => {
            let abi = value.parse().ok().filter(|abi| *abi > 0);
            landlock(options).least_abi = abi.ok_or_else(|| bad(flag, &value, "must be a number from 1"))?;
        }
        "allow-path" => {
            let path =
                AllowedPath::parse(&value).ok_or_else(|| bad(flag, &value, "must be PATH, PATH:ro or PATH:rw"))?;
            landlock(options).allow.push(path);
        }
        "log-path" => options.logger.log_path = Some(value.into()),
        "level" => options.logger.level = Some(level(&value)?),
        "module" => options.logger.module = Some(value),
        "metrics-path" => options.metrics_path = Some(value.into()),
        "http-api-max-payload-size" => options.max_payload = bytes()?,
        "mmds-size-limit" => options.mmds_limit = Some(bytes()?),
        "metadata" => options.metadata = Some(value.into()),
        "prepare" => options.prepare = Some(value.into()),
        "working-set-path" => options.working_set_path = Some(value.into()),
        "start-time-us" => options.start_time_us = Some(number()?),
        "start-time-cpu-us" => options.start_time_cpu_us = Some(number()?),
        "parent-cpu-time-us" => options.parent_cpu_time_us = Some(number()?),
        _ => {}
    }
    Ok(())
}

fn api_socket(value: &str) -> Result<ApiSocket, CliError> {
    match value.strip_prefix("fd:") {
        None if value.is_empty() => Err(bad("api-sock", value, "must be a path or fd:N")),
        None => Ok(ApiSocket::Path(value.into())),
        Some(number) => match number.parse() {
            Ok(descriptor) if descriptor >= 0 => Ok(ApiSocket::Descriptor(descriptor)),
            _ => Err(bad("api-sock", value, "after fd: there must be the number of a descriptor")),
        },
    }
}

/// The number of a descriptor beyond the standard streams.
fn passed_fd(flag: &str, value: &str) -> Result<RawFd, CliError> {
    let number = value.parse().ok().filter(|fd| *fd > 2);
    number.ok_or_else(|| bad(flag, value, "must be the number of a descriptor above 2"))
}

fn landlock(options: &mut Options) -> &mut LandlockConfig {
    options.sandbox.landlock.get_or_insert_default()
}

fn instance_id(value: String) -> Result<String, CliError> {
    let legal = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if legal && (1..=64).contains(&value.len()) {
        return Ok(value);
    }
    Err(bad("id", &value, "must be 1 to 64 letters, digits and hyphens"))
}

fn level(value: &str) -> Result<log::LevelFilter, CliError> {
    LogLevel::from_name(value).ok_or_else(|| bad("level", value, "must be Off, Error, Warning, Info, Debug or Trace"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Options {
        match parse(line.split_whitespace()) {
            Ok(Cli::Run(options)) => *options,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn refusal(line: &str) -> String {
        parse(line.split_whitespace()).unwrap_err().to_string()
    }

    #[test]
    fn without_arguments_the_defaults_hold() {
        assert_eq!(options(""), Options::unless_said_otherwise());
        assert_eq!(options("").api_sock, Some(ApiSocket::Path("/run/firecracker.socket".into())));
    }

    #[test]
    fn a_launcher_says_what_it_wants() {
        let line = "--id vm-1 --api-sock=/tmp/a --start-time-us 12 --start-time-cpu-us 3 --parent-cpu-time-us=4 \
             --log-path /tmp/log --level warn --show-level --show-log-origin --module vesicle::api --boot-timer \
             --metrics-path m --http-api-max-payload-size 100 --mmds-size-limit 200 --metadata m.json --prepare s \
             --working-set-path w \
             --no-seccomp --no-landlock --kvm-fd 9 --proc-fd 8";
        let logger = LoggerConfig {
            log_path: Some("/tmp/log".into()),
            level: Some(log::LevelFilter::Warn),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: Some("vesicle::api".into()),
        };
        let expected = Options {
            api_sock: Some(ApiSocket::Path("/tmp/a".into())),
            id: "vm-1".into(),
            config_file: None,
            passed_fds: Vec::new(),
            kvm_fd: Some(9),
            proc_fd: Some(8),
            sandbox: SandboxConfig { seccomp: SeccompConfig::Off, landlock: None },
            logger,
            metrics_path: Some("m".into()),
            boot_timer: true,
            max_payload: 100,
            mmds_limit: Some(200),
            metadata: Some("m.json".into()),
            prepare: Some("s".into()),
            working_set_path: Some("w".into()),
            start_time_us: Some(12),
            start_time_cpu_us: Some(3),
            parent_cpu_time_us: Some(4),
        };
        assert_eq!(options(line), expected);
        assert_eq!(options("--api-sock fd:5").api_sock, Some(ApiSocket::Descriptor(5)));
        assert_eq!(options("--config-file c --no-api").api_sock, None);
        assert_eq!(options("--pass-fd 3 --pass-fd=7").passed_fds, [3, 7]);
    }

    #[test]
    fn the_confinement_is_on_unless_it_is_said_otherwise() {
        let line = "--seccomp-filter f --landlock-abi 4 --allow-path /a --allow-path=/b:ro";
        let path = |path: &str, write| AllowedPath { path: path.into(), write };
        let landlock = LandlockConfig { least_abi: 4, allow: vec![path("/a", true), path("/b", false)] };
        let expected = SandboxConfig { seccomp: SeccompConfig::File("f".into()), landlock: Some(landlock) };
        assert_eq!(options(line).sandbox, expected);
        assert!(options("").sandbox.landlock.is_some() && options("").sandbox.seccomp == SeccompConfig::BuiltIn);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, expected) in [
            ("--no-api", "--no-api needs --config-file"),
            ("--working-set-path w", "--working-set-path needs --prepare"),
            ("--nope", "unknown argument \"--nope\"; --help lists the flags"),
            ("-x", "unknown argument \"-x\"; --help lists the flags"),
            ("file", "unknown argument \"file\"; --help lists the flags"),
            ("--id", "--id needs a value: ID"),
            ("--id a --id b", "--id is given twice"),
            ("--id a_b", "--id \"a_b\": must be 1 to 64 letters, digits and hyphens"),
            ("--boot-timer=yes", "--boot-timer takes no value"),
            ("--level loud", "--level \"loud\": must be Off, Error, Warning, Info, Debug or Trace"),
            ("--api-sock fd:x", "--api-sock \"fd:x\": after fd: there must be the number of a descriptor"),
            ("--api-sock fd:-1", "--api-sock \"fd:-1\": after fd: there must be the number of a descriptor"),
            ("--pass-fd x", "--pass-fd \"x\": must be the number of a descriptor above 2"),
            ("--pass-fd 2", "--pass-fd \"2\": must be the number of a descriptor above 2"),
            ("--kvm-fd 1", "--kvm-fd \"1\": must be the number of a descriptor above 2"),
            ("--pass-fd 3 --kvm-fd 3", "--kvm-fd \"3\": is given twice"),
            ("--kvm-fd 5 --pass-fd 5", "--kvm-fd \"5\": is given twice"),
            ("--kvm-fd 5 --proc-fd 5", "--proc-fd \"5\": is given twice"),
            ("--api-sock fd:5 --pass-fd 5", "--api-sock \"5\": is given twice"),
            ("--landlock-abi 0", "--landlock-abi \"0\": must be a number from 1"),
            ("--allow-path :ro", "--allow-path \":ro\": must be PATH, PATH:ro or PATH:rw"),
            ("--no-seccomp --seccomp-filter f", "--seccomp-filter and --no-seccomp exclude each other"),
            ("--allow-path /a --no-landlock", "--allow-path and --no-landlock exclude each other"),
            ("--pass-fd 3 --pass-fd 3", "--pass-fd \"3\": is given twice"),
            ("--mmds-size-limit -1", "--mmds-size-limit \"-1\": must be a number of bytes"),
            ("--start-time-us -1", "--start-time-us \"-1\": must be a number of microseconds"),
            ("--http-api-max-payload-size 1k", "--http-api-max-payload-size \"1k\": must be a number of bytes"),
        ] {
            assert_eq!(refusal(line), expected);
        }
        assert!(parse(["--id", &"a".repeat(65)]).is_err() && parse(["--id", ""]).is_err());
        assert!(parse(["--id", &"a".repeat(64)]).is_ok());
    }

    #[test]
    fn the_help_text_has_every_flag_and_fits_a_terminal() {
        let Ok(Cli::Print(text)) = parse(["--help"]) else { panic!("no help") };
        for Flag(name, ..) in FLAGS {
            assert!(text.contains(&format!("  --{name}")), "{name}");
        }
        assert!(text.lines().all(|line| line.len() <= 120), "{text}");
        assert_eq!(parse(["--snapshot-version"]), Ok(Cli::Print("v2.0.0\n".into())));
        assert_eq!(parse(["--describe-snapshot=x"]), Ok(Cli::DescribeSnapshot("x".into())));
        assert_eq!(refusal("--describe-snapshot"), "--describe-snapshot needs a value: PATH");
        assert!(matches!(parse(["--version"]), Ok(Cli::Print(text)) if text.starts_with("Vesicle v")));
    }
}
