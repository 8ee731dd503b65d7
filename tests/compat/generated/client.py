"""A launcher on the client that a standard generator makes of resources/openapi.yaml.

Each line of standard input is a JSON object: a step, the API socket it is for, and what the step takes. Each is answered
with a line of JSON, the step's result. The first thing that goes wrong ends the program.
"""

import json
import sys

import httpx
from vesicle_api_client import Client
from vesicle_api_client.api.default import (
    create_snapshot,
    create_sync_action,
    describe_instance,
    get_machine_configuration,
    get_metrics,
    get_version,
    load_snapshot,
    patch_guest_drive_by_id,
    patch_guest_network_interface_by_id,
    patch_vm,
    put_guest_boot_source,
    put_guest_drive_by_id,
    put_guest_network_interface_by_id,
    put_guest_vsock,
    put_logger,
    put_machine_configuration,
    put_metrics,
)
from vesicle_api_client.models import (
    BootSource,
    Drive,
    Error,
    InstanceAction,
    InstanceActionActionType,
    Logger,
    MachineConfiguration,
    MemoryBackend,
    MemoryBackendType,
    Metrics,
    NetworkInterface,
    PartialDrive,
    PartialNetworkInterface,
    RateLimiter,
    SnapshotCreateParams,
    SnapshotLoadParams,
    SnapshotType,
    TokenBucket,
    Vm,
    VmState,
    Vsock,
)


def done(call, client, *ids, **arguments):
    """Makes a call, which must be done."""
    response = call.sync_detailed(*ids, client=client, **arguments)
    assert response.status_code == 204, response


def configure(client, guest):
    """Everything before the start."""
    done(put_logger, client, body=Logger(log_path=guest["log"], show_level=True))
    done(put_metrics, client, body=Metrics(metrics_path=guest["metrics"]))
    done(put_machine_configuration, client, body=MachineConfiguration(vcpu_count=2, mem_size_mib=80))
    assert get_machine_configuration.sync(client=client).vcpu_count == 2
    done(
        put_guest_boot_source,
        client,
        body=BootSource(
            kernel_image_path=guest["kernel"], initrd_path=guest["initramfs"], boot_args=guest["boot_args"]
        ),
    )
    done(
        put_guest_drive_by_id,
        client,
        "job",
        body=Drive(drive_id="job", is_root_device=False, path_on_host=guest["job"]),
    )
    done(
        put_guest_network_interface_by_id,
        client,
        "net0",
        body=NetworkInterface(iface_id="net0", host_dev_name=guest["tap"], guest_mac=guest["mac"]),
    )
    done(put_guest_vsock, client, body=Vsock(guest_cid=7, uds_path=guest["vsock"]))
    return get_version.sync(client=client).to_dict()


def limit(client, _):
    """Changes of devices while the guest runs."""
    bucket = TokenBucket(size=50 << 20, refill_time=1000)
    body = PartialNetworkInterface(iface_id="net0", rx_rate_limiter=RateLimiter(bandwidth=bucket))
    done(patch_guest_network_interface_by_id, client, "net0", body=body)
    body = PartialDrive(drive_id="job", rate_limiter=RateLimiter(ops=TokenBucket(size=5000, refill_time=1000)))
    done(patch_guest_drive_by_id, client, "job", body=body)


def start(client, _):
    """InstanceStart."""
    done(create_sync_action, client, body=InstanceAction(action_type=InstanceActionActionType.INSTANCESTART))


def start_again(client, _):
    """InstanceStart where it is refused; what the refusal says."""
    error = create_sync_action.sync(
        client=client, body=InstanceAction(action_type=InstanceActionActionType.INSTANCESTART)
    )
    assert isinstance(error, Error), error
    return error.fault_message


def flush(client, _):
    """FlushMetrics."""
    done(create_sync_action, client, body=InstanceAction(action_type=InstanceActionActionType.FLUSHMETRICS))


def pause(client, _):
    """PATCH /vm."""
    done(patch_vm, client, body=Vm(state=VmState.PAUSED))


def resume(client, _):
    """PATCH /vm."""
    done(patch_vm, client, body=Vm(state=VmState.RESUMED))


def state(client, _):
    """The instance's state."""
    return describe_instance.sync(client=client).state.value


def metrics(client, _):
    """All metrics, in the OpenMetrics format."""
    return get_metrics.sync(client=client)


def save(client, guest):
    """A full snapshot."""
    body = SnapshotCreateParams(
        snapshot_path=guest["state"], mem_file_path=guest["memory"], snapshot_type=SnapshotType.FULL
    )
    done(create_snapshot, client, body=body)


def load(client, guest):
    """Loads it; the guest runs at once."""
    backend = MemoryBackend(backend_type=MemoryBackendType.FILE, backend_path=guest["memory"])
    body = SnapshotLoadParams(snapshot_path=guest["state"], mem_backend=backend, resume_vm=True)
    done(load_snapshot, client, body=body)


STEPS = {
    step.__name__: step
    for step in (configure, limit, start, start_again, flush, pause, resume, state, metrics, save, load)
}

for line in sys.stdin:
    request = json.loads(line)
    transport = httpx.HTTPTransport(uds=request["socket"])
    with Client(base_url="http://localhost", timeout=httpx.Timeout(60), httpx_args={"transport": transport}) as client:
        print(json.dumps(STEPS[request["step"]](client, request)), flush=True)
