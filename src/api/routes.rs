//! Method, path and body to a command: no I/O, no state.

use std::path::PathBuf;

use hyper::Method;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use super::types;
use crate::config::{ConfigError, CpuConfig, VmConfig, check_resource_id};
use crate::control::{Command, Reply};
use crate::metrics::{Counter, METRICS};

/// What a request asks for.
#[derive(Debug)]
pub enum Action {
    /// Something of the vmm thread.
    Ask(Ask),
    /// GET /version.
    Version,
    /// GET /metrics.
    Metrics,
    /// GET /events.
    Events,
    /// GET /openapi.yaml.
    OpenApi,
}

/// A command and what is known of its request.
#[derive(Debug)]
pub struct Ask {
    /// For the vmm thread.
    pub command: Command,
    /// The request used something that is going away.
    pub deprecated: bool,
    /// To count if the vmm thread refuses.
    pub refusals: Option<&'static Counter>,
}

/// One endpoint.
pub struct Endpoint {
    /// HTTP method.
    pub method: Method,
    /// Path without the leading slash; a last segment in braces is a resource id.
    pub path: &'static str,
    /// Makes the action of the resource id (empty if there is none) and the body.
    handle: fn(id: &str, body: &[u8]) -> Result<Action, Rejection>,
    /// Requests; those refused.
    counters: Option<(&'static Counter, Option<&'static Counter>)>,
}

/// Why a handler refuses.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum Rejection {
    Json(#[from] serde_json::Error),
    Config(#[from] ConfigError),
}

/// An [`Endpoint`]: `METHOD "path" handler`, then perhaps the counters of requests and refusals.
macro_rules! endpoint {
    ($method:ident $path:literal $handle:expr $(, $group:ident $count:ident $($fails:ident)?)?) => {
        Endpoint {
            method: Method::$method,
            path: $path,
            handle: $handle,
            counters: endpoint!(@counters $($group $count $($fails)?)?),
        }
    };
    (@counters) => { None };
    (@counters $group:ident $count:ident) => { Some((&METRICS.$group.$count, None)) };
    (@counters $group:ident $count:ident $fails:ident) => {
        Some((&METRICS.$group.$count, Some(&METRICS.$group.$fails)))
    };
}

/// Every endpoint that answers.
pub static ENDPOINTS: &[Endpoint] = &[
    endpoint!(GET "" |_, _| ask(Command::GetInstance), get_api_requests instance_info_count),
    endpoint!(GET "version" |_, _| Ok(Action::Version), get_api_requests vmm_version_count),
    endpoint!(GET "vm/config" |_, _| ask(Command::GetConfig)),
    endpoint!(GET "machine-config" |_, _| ask(Command::GetMachine), get_api_requests machine_cfg_count),
    endpoint!(GET "metrics" |_, _| Ok(Action::Metrics)),
    endpoint!(GET "events" |_, _| Ok(Action::Events)),
    endpoint!(GET "openapi.yaml" |_, _| Ok(Action::OpenApi)),
    endpoint!(PUT "actions" |_, body| put_action(body), put_api_requests actions_count actions_fails),
    endpoint!(PUT "boot-source" |_, body| {
        ask(Command::SetBootSource(parse::<types::BootSource>(body)?.try_into()?))
    }, put_api_requests boot_source_count boot_source_fails),
    endpoint!(PUT "machine-config" |_, body| put_machine_config(body),
        put_api_requests machine_cfg_count machine_cfg_fails),
    endpoint!(PATCH "machine-config" |_, body| patch_machine_config(body),
        patch_api_requests machine_cfg_count machine_cfg_fails),
    endpoint!(PUT "cpu-config" |_, body| ask(Command::SetCpu(parse::<types::CpuConfig>(body)?.try_into()?)),
        put_api_requests cpu_cfg_count cpu_cfg_fails),
    endpoint!(PUT "drives/{drive_id}" put_drive, put_api_requests drive_count drive_fails),
    endpoint!(PATCH "drives/{drive_id}" patch_drive, patch_api_requests drive_count drive_fails),
    endpoint!(PUT "network-interfaces/{iface_id}" put_network_interface, put_api_requests network_count network_fails),
    endpoint!(PATCH "network-interfaces/{iface_id}" patch_network_interface,
        patch_api_requests network_count network_fails),
    endpoint!(PUT "vsock" |_, body| put_vsock(body), put_api_requests vsock_count vsock_fails),
    endpoint!(PUT "serial" |_, body| ask(Command::SetSerial(parse::<types::SerialDevice>(body)?.into())),
        put_api_requests serial_count serial_fails),
    endpoint!(PUT "logger" |_, body| ask(Command::SetLogger(parse::<types::Logger>(body)?.into())),
        put_api_requests logger_count logger_fails),
    endpoint!(PUT "metrics" |_, body| ask(Command::SetMetrics(parse::<types::Metrics>(body)?.into())),
        put_api_requests metrics_count metrics_fails),
    endpoint!(GET "mmds" |_, _| ask(Command::GetMetadata), get_api_requests mmds_count),
    endpoint!(PUT "mmds" |_, body| ask(Command::PutMetadata(parse(body)?)), put_api_requests mmds_count mmds_fails),
    endpoint!(PATCH "mmds" |_, body| ask(Command::PatchMetadata(parse(body)?)),
        patch_api_requests mmds_count mmds_fails),
    endpoint!(PUT "mmds/config" |_, body| put_mmds_config(body), put_api_requests mmds_count mmds_fails),
    endpoint!(PUT "snapshot/create" |_, body| {
        ask(Command::CreateSnapshot(parse::<types::SnapshotCreateParams>(body)?.try_into()?))
    }),
    endpoint!(PUT "snapshot/load" |_, body| put_snapshot_load(body)),
    endpoint!(PUT "snapshot/reset" |_, body| ask(Command::Reset(parse::<types::SnapshotResetParams>(body)?.into()))),
    endpoint!(PATCH "vm" |_, body| patch_vm(body), patch_api_requests vm_count vm_fails),
];

/// What published clients may ask for and this release does not do: first path segments.
const UNAVAILABLE: &[&str] = &["balloon", "entropy", "hotplug", "pmem"];
const OUT_OF_SCOPE: &str = "is not supported: it is outside the scope of this VMM";

/// Finds what a request asks for.
///
/// # Errors
/// An unknown path or method, a body that is missing, not wanted or wrong, an id that differs from
/// the body's, a value out of range.
pub fn route(method: &Method, path: &str, body: &[u8]) -> Result<Action, ApiError> {
    let trimmed = path.strip_prefix('/').unwrap_or(path);
    let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
    let Some((endpoint, id)) = find(method, trimmed) else {
        return Err(unknown(method, path, trimmed));
    };
    let (requests, refusals) = endpoint.counters.unzip();
    let refusals = refusals.flatten();
    requests.inspect(|counter| counter.inc());
    match handle(endpoint, id, body) {
        Ok(Action::Ask(ask)) => Ok(Action::Ask(Ask { refusals, ..ask })),
        Ok(action) => Ok(action),
        Err(rejection) => {
            refusals.inspect(|counter| counter.inc());
            Err(ApiError::bad_request(match rejection {
                Some(Rejection::Json(error)) => format!("The JSON body of {method} {path} is not valid: {error}."),
                Some(Rejection::Config(error)) => format!("{method} {path}: {error}."),
                None if *method == Method::GET => format!("{method} {path}: a GET request cannot have a body."),
                None => format!("{method} {path}: the request has no body; send a JSON object."),
            }))
        }
    }
}

impl Endpoint {
    /// The resource id in `path` (empty if the endpoint has none) if `path` is this endpoint's.
    fn matches<'p>(&self, path: &'p str) -> Option<&'p str> {
        match self.path.split_once("/{") {
            None => (self.path == path).then_some(""),
            Some((prefix, _)) => path.strip_prefix(prefix)?.strip_prefix('/').filter(|id| !id.contains('/')),
        }
    }
}

fn find<'p>(method: &Method, path: &'p str) -> Option<(&'static Endpoint, &'p str)> {
    ENDPOINTS
        .iter()
        .filter(|endpoint| endpoint.method == *method)
        .find_map(|endpoint| Some((endpoint, endpoint.matches(path)?)))
}

/// `None` is a body where none is wanted, or none where one is.
fn handle(endpoint: &Endpoint, id: &str, body: &[u8]) -> Result<Action, Option<Rejection>> {
    if body.is_empty() != (endpoint.method == Method::GET) {
        return Err(None);
    }
    (endpoint.handle)(id, body).map_err(Some)
}

fn unknown(method: &Method, path: &str, trimmed: &str) -> ApiError {
    let first = trimmed.split('/').next().unwrap_or_default();
    if UNAVAILABLE.contains(&first) {
        return ApiError::bad_request(format!("{method} {path} {OUT_OF_SCOPE}."));
    }
    if *method == Method::DELETE {
        return ApiError::bad_request(format!("{method} {path}: unplugging devices {OUT_OF_SCOPE}."));
    }
    ApiError::bad_request(format!("Invalid request method or path: {method} {path}. GET /openapi.yaml lists them."))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Rejection> {
    Ok(serde_json::from_slice(body)?)
}

fn ask(command: Command) -> Result<Action, Rejection> {
    ask_marked(command, false)
}

/// `deprecated`: the request used something that is going away.
fn ask_marked(command: Command, deprecated: bool) -> Result<Action, Rejection> {
    Ok(Action::Ask(Ask { command, deprecated, refusals: None }))
}

fn put_action(body: &[u8]) -> Result<Action, Rejection> {
    ask(match parse::<types::InstanceAction>(body)?.action_type {
        types::ActionType::FlushMetrics => Command::FlushMetrics,
        types::ActionType::InstanceStart => Command::Start,
        types::ActionType::SendCtrlAltDel => Command::SendCtrlAltDel,
    })
}

fn patch_vm(body: &[u8]) -> Result<Action, Rejection> {
    ask(match parse::<types::Vm>(body)?.state {
        types::VmState::Paused => Command::Pause,
        types::VmState::Resumed => Command::Resume,
    })
}

fn put_machine_config(body: &[u8]) -> Result<Action, Rejection> {
    let body: types::MachineConfiguration = parse(body)?;
    let deprecated = body.cpu_template.is_some();
    ask_marked(Command::SetMachine(body.try_into()?), deprecated)
}

fn patch_machine_config(body: &[u8]) -> Result<Action, Rejection> {
    let body: types::MachineConfigurationUpdate = parse(body)?;
    let deprecated = body.cpu_template.is_some();
    ask_marked(Command::PatchMachine(body.try_into()?), deprecated)
}

fn put_mmds_config(body: &[u8]) -> Result<Action, Rejection> {
    let body: types::MmdsConfig = parse(body)?;
    let deprecated = body.version == types::MmdsVersion::V1;
    ask_marked(Command::SetMmds(body.try_into()?), deprecated)
}

fn put_vsock(body: &[u8]) -> Result<Action, Rejection> {
    let body: types::Vsock = parse(body)?;
    let deprecated = body.vsock_id.is_some();
    ask_marked(Command::SetVsock(body.try_into()?), deprecated)
}

fn put_snapshot_load(body: &[u8]) -> Result<Action, Rejection> {
    let body: types::SnapshotLoadParams = parse(body)?;
    let deprecated = body.mem_file_path.is_some() || body.enable_diff_snapshots == Some(true);
    ask_marked(Command::LoadSnapshot(Box::new(body.try_into()?)), deprecated)
}

/// The body of a request for the resource `id`, which it names as well.
fn parse_named<T: DeserializeOwned>(
    field: &'static str,
    id: &str,
    body: &[u8],
    name: fn(&T) -> &str,
) -> Result<T, Rejection> {
    check_resource_id(field, id)?;
    let body = parse(body)?;
    match name(&body) {
        same if same == id => Ok(body),
        other => Err(ConfigError::IdMismatch { field, path: id.to_owned(), body: other.to_owned() }.into()),
    }
}

fn put_drive(id: &str, body: &[u8]) -> Result<Action, Rejection> {
    let body = parse_named("drive_id", id, body, |body: &types::Drive| &body.drive_id)?;
    ask(Command::SetDrive(Box::new(body.try_into()?)))
}

fn patch_drive(id: &str, body: &[u8]) -> Result<Action, Rejection> {
    let body = parse_named("drive_id", id, body, |body: &types::PartialDrive| &body.drive_id)?;
    ask(Command::UpdateDrive(body.try_into()?))
}

fn put_network_interface(id: &str, body: &[u8]) -> Result<Action, Rejection> {
    let body = parse_named("iface_id", id, body, |body: &types::NetworkInterface| &body.iface_id)?;
    ask(Command::SetNetworkInterface(Box::new(body.try_into()?)))
}

fn patch_network_interface(id: &str, body: &[u8]) -> Result<Action, Rejection> {
    let body = parse_named("iface_id", id, body, |body: &types::PartialNetworkInterface| &body.iface_id)?;
    ask(Command::UpdateNetworkInterface(body.try_into()?))
}

/// The body of the answer to a GET; `None` for "done, nothing to say".
pub fn show(reply: &Reply) -> Option<Vec<u8>> {
    // None of these types can fail to serialise but for a path that is not UTF-8, and the paths
    // came as JSON.
    match reply {
        Reply::Done | Reply::DoesNotFit(_) => None,
        Reply::Metadata(value) => serde_json::to_vec(value).ok(),
        Reply::Instance { id, state } => Some(instance(id, *state)),
        Reply::Machine(machine) => serde_json::to_vec(&types::MachineConfiguration::from(machine)).ok(),
        Reply::Config(config) => Some(full_config(config)),
    }
}

fn instance(id: &str, state: crate::control::Lifecycle) -> Vec<u8> {
    let info = types::InstanceInfo {
        id: id.to_owned(),
        state: state.into(),
        vmm_version: super::VERSION.to_owned(),
        app_name: "Vesicle".to_owned(),
    };
    serde_json::to_vec(&info).unwrap_or_default()
}

/// The body of GET /version.
pub fn version() -> Vec<u8> {
    let version = types::Version {
        firecracker_version: super::API_VERSION.to_owned(),
        vesicle_version: super::VERSION.to_owned(),
    };
    serde_json::to_vec(&version).unwrap_or_default()
}

/// The body of GET /vm/config, which [`config_commands`] reads.
pub fn full_config(config: &VmConfig) -> Vec<u8> {
    serde_json::to_vec(&types::FullVmConfiguration::from(config)).unwrap_or_default()
}

/// The commands of a configuration file: those its parts would be as requests, the log's and the
/// metrics' first. Starting the microVM is not among them.
///
/// # Errors
/// As [`route`].
pub fn config_commands(json: &[u8]) -> Result<Vec<Command>, ApiError> {
    commands(json).map_err(|rejection| {
        ApiError::bad_request(match rejection {
            Rejection::Json(error) => format!("The JSON is not valid: {error}."),
            Rejection::Config(error) => format!("{error}."),
        })
    })
}

fn commands(json: &[u8]) -> Result<Vec<Command>, Rejection> {
    let file: types::FullVmConfiguration = parse(json)?;
    for (present, reason) in [
        (file.balloon.is_some(), "balloon is outside the scope of this VMM; leave it out"),
        (file.entropy.is_some(), "entropy is outside the scope of this VMM; leave it out"),
        (!file.pmem.is_empty(), "pmem is outside the scope of this VMM; leave it out"),
        (file.memory_hotplug.is_some(), "memory-hotplug is outside the scope of this VMM; leave it out"),
    ] {
        if present {
            return Err(ConfigError::Unavailable(reason).into());
        }
    }
    let mut commands = Vec::new();
    commands.extend(file.logger.map(|body| Command::SetLogger(body.into())));
    commands.extend(file.metrics.map(|body| Command::SetMetrics(body.into())));
    commands.extend(file.machine_config.map(TryInto::try_into).transpose()?.map(Command::SetMachine));
    match file.cpu_config {
        Some(types::CpuConfigSource::Body(body)) => commands.push(Command::SetCpu(body.try_into()?)),
        Some(types::CpuConfigSource::Path(path)) => commands.push(Command::SetCpu(cpu_config_file(path)?)),
        None => {}
    }
    commands.extend(file.boot_source.map(TryInto::try_into).transpose()?.map(Command::SetBootSource));
    for body in file.drives {
        commands.push(Command::SetDrive(Box::new(body.try_into()?)));
    }
    for body in file.network_interfaces {
        commands.push(Command::SetNetworkInterface(Box::new(body.try_into()?)));
    }
    commands.extend(file.vsock.map(TryInto::try_into).transpose()?.map(Command::SetVsock));
    commands.extend(file.serial.map(|body| Command::SetSerial(body.into())));
    commands.extend(file.mmds_config.map(TryInto::try_into).transpose()?.map(Command::SetMmds));
    Ok(commands)
}

/// The one thing that is read here: a file that a configuration file refers to.
fn cpu_config_file(path: PathBuf) -> Result<CpuConfig, ConfigError> {
    let read = || serde_json::from_slice::<types::CpuConfig>(&std::fs::read(&path)?).map_err(std::io::Error::other);
    match read() {
        Ok(body) => body.try_into(),
        Err(error) => Err(ConfigError::CpuConfigFile(path, error.to_string())),
    }
}

#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod tests_random;
