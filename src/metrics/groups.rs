//! The metrics themselves: name, meaning and kind of each.

use super::{Counter, Fields, Gauge, Group, Metric};

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
        /// Requests for the metadata.
        mmds_count: Counter,
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
        /// CPU configurations.
        cpu_cfg_count: Counter,
        /// CPU configurations refused.
        cpu_cfg_fails: Counter,
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
        /// Metadata, and its configuration.
        mmds_count: Counter,
        /// The same refused.
        mmds_fails: Counter,
        /// Metrics configurations.
        metrics_count: Counter,
        /// Metrics configurations refused.
        metrics_fails: Counter,
        /// Network interfaces.
        network_count: Counter,
        /// Network interfaces refused.
        network_fails: Counter,
        /// Serial configurations.
        serial_count: Counter,
        /// Serial configurations refused.
        serial_fails: Counter,
        /// Vsock configurations.
        vsock_count: Counter,
        /// Vsock configurations refused.
        vsock_fails: Counter,
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
        /// Changes to network interfaces.
        network_count: Counter,
        /// Changes to network interfaces refused.
        network_fails: Counter,
        /// Changes to the metadata.
        mmds_count: Counter,
        /// Changes to the metadata refused.
        mmds_fails: Counter,
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
        /// A full snapshot as the client saw it, in microseconds.
        full_create_snapshot: Gauge,
        /// A diff snapshot as the client saw it, in microseconds.
        diff_create_snapshot: Gauge,
        /// The load of a snapshot as the client saw it, in microseconds.
        load_snapshot: Gauge,
        /// How long a live snapshot had the microVM paused, in microseconds.
        live_snapshot_pause: Gauge,
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
    /// The metadata service.
    Mmds {
        /// Frames of the guest that were for the service.
        rx_accepted: Counter,
        /// Those of them that were dropped.
        rx_accepted_err: Counter,
        /// Requests.
        rx_count: Counter,
        /// Requests to read with a token that is not valid.
        rx_invalid_token: Counter,
        /// Requests to read without a token.
        rx_no_token: Counter,
        /// Bytes of frames sent to the guest.
        tx_bytes: Counter,
        /// Responses.
        tx_count: Counter,
        /// Responses that were cut off because the guest did not take them.
        tx_errors: Counter,
        /// Frames sent to the guest.
        tx_frames: Counter,
        /// Connections the guest opened.
        connections_created: Counter,
        /// Connections that ended.
        connections_destroyed: Counter,
    }
    /// What the process's threads have given up.
    Sandbox {
        /// ABI of the host's Landlock; 0 if it is not used.
        landlock_abi: Gauge,
        /// Layers of Landlock that were put on threads.
        landlock_layers: Counter,
        /// Threads that were put under a system-call filter.
        seccomp_filters: Counter,
    }
    /// Snapshots.
    Snapshot {
        /// Bytes of a working set that were populated.
        working_set_bytes: Counter,
        /// Bytes that live snapshots copied while the microVM ran.
        live_running_bytes: Counter,
        /// Bytes that live snapshots copied while it was paused.
        live_paused_bytes: Counter,
    }
    /// The VMM itself.
    Vmm {
        /// Panics.
        panic_count: Counter,
    }
    /// The serial port.
    Uart {
        /// Bytes the guest wrote that could not be put out.
        missed_write_count: Counter,
        /// Bytes given to the guest to read.
        read_count: Counter,
        /// Bytes the guest wrote that were put out.
        write_count: Counter,
        /// Bytes dropped by the rate limiter.
        rate_limiter_dropped_bytes: Counter,
    }
    /// The keyboard controller.
    I8042 {
        /// Bytes the guest read.
        read_count: Counter,
        /// Resets the guest asked for.
        reset_count: Counter,
        /// Bytes the guest wrote.
        write_count: Counter,
    }
    /// The vsock device.
    Vsock {
        /// Wakes by the guest's notification.
        queue_event_count: Counter,
        /// Packets to the guest.
        rx_packets_count: Counter,
        /// Bytes of data to the guest.
        rx_bytes_count: Counter,
        /// Packets from the guest.
        tx_packets_count: Counter,
        /// Bytes of data from the guest.
        tx_bytes_count: Counter,
        /// Connections begun by either side.
        conns_added: Counter,
        /// Connections ended.
        conns_removed: Counter,
        /// Connections ended because the guest broke the protocol.
        conns_killed: Counter,
        /// Connections refused: nobody listens, too many, or no CONNECT line in time.
        conns_refused: Counter,
        /// Reads from a host process that failed.
        rx_read_fails: Counter,
        /// Writes to a host process that failed.
        tx_write_fails: Counter,
        /// Times the guest broke the protocol and the device asked for a reset.
        needs_reset: Counter,
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
        /// Bytes of the drive that the guest has written to its overlay.
        overlay_bytes: Gauge,
    }
    /// One network interface.
    Net {
        /// Frames the guest received.
        rx_packets_count: Counter,
        /// Bytes of them.
        rx_bytes_count: Counter,
        /// Frames for the guest dropped because its buffers can never hold them.
        rx_fails: Counter,
        /// Times a frame for the guest had to wait for buffers.
        no_rx_avail_buffer: Counter,
        /// Times the rate limiter stopped receiving.
        rx_rate_limiter_throttled: Counter,
        /// Wakes by the TAP.
        rx_tap_event_count: Counter,
        /// Reads of the TAP that failed.
        tap_read_fails: Counter,
        /// Frames the guest sent.
        tx_packets_count: Counter,
        /// Bytes of them.
        tx_bytes_count: Counter,
        /// Frames of the guest dropped: malformed, or refused by the TAP.
        tx_fails: Counter,
        /// Frames of the guest dropped because no frame has such a length.
        tx_malformed_frames: Counter,
        /// Writes to the TAP that failed.
        tap_write_fails: Counter,
        /// Times the rate limiter stopped sending.
        tx_rate_limiter_throttled: Counter,
        /// Wakes by the guest's notification.
        queue_event_count: Counter,
        /// Times the guest broke the protocol and the device asked for a reset.
        needs_reset: Counter,
    }
}
