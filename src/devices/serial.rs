//! A 16550A UART (National Semiconductor PC16550D data sheet) whose speed is the host's.
//!
//! The vCPU puts bytes into a bounded buffer, the vmm thread takes them out and writes them to the
//! host. While the buffer is full the transmitter reports itself busy, so a driver that heeds the
//! line status waits for a slow reader instead of losing output; one that does not loses the
//! excess, which is counted. Neither a flooding guest nor a flooding host grows memory.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use vmm_sys_util::eventfd::EventFd;

use super::Line;

/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// Ports of a UART.
pub const PORTS: u16 = 8;
/// The I/O APIC pin of COM1.
pub const COM1_IRQ: u32 = 4;

/// Bytes the guest may be ahead of the host.
pub const OUTPUT_CAPACITY: usize = 16 << 10;
/// A driver that saw the transmitter empty writes this many bytes without looking again.
const TRANSMIT_FIFO: usize = 16;
/// Bytes the host may be ahead of the guest.
const INPUT_CAPACITY: usize = 64;

const DATA: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMITTER: u8 = 2;
const IER_MASK: u8 = 0xf;
const IIR_NONE: u8 = 1;
const IIR_TRANSMITTER: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_FIFO: u8 = 0xc0;
const LCR_DLAB: u8 = 0x80;
const LCR_8N1: u8 = 3;
const LSR_DATA_READY: u8 = 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
const MCR_MASK: u8 = 0x1f;
const MCR_LOOP: u8 = 0x10;
const MCR_OUT2: u8 = 8;
/// CTS, DSR and DCD: somebody is always listening.
const MSR_CONNECTED: u8 = 0xb0;
/// 9600 baud on the 1.8432 MHz clock.
const DIVISOR: [u8; 2] = [12, 0];

/// The registers and the input on its way. Output is the host's by the time it is saved, or lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    input: VecDeque<u8>,
    /// The transmitter interrupt is raised: from "became empty" until the driver reads IIR.
    transmitter_pending: bool,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
}

/// COM1.
pub struct Serial {
    interrupt: Line,
    /// Signalled when the vmm thread has something to do: output to write, room for input.
    wake: EventFd,
    output: VecDeque<u8>,
    /// The vmm thread was told of output it has not fetched yet.
    woken: bool,
    /// The host has input that did not fit.
    input_waits: bool,
    lost: u64,
    state: SerialState,
}

impl Serial {
    /// A UART that interrupts through `interrupt` and calls the vmm thread through `wake`.
    pub fn new(interrupt: Line, wake: EventFd) -> Self {
        let state = SerialState {
            input: VecDeque::with_capacity(INPUT_CAPACITY),
            transmitter_pending: false,
            ier: 0,
            lcr: LCR_8N1,
            mcr: MCR_OUT2,
            scratch: 0,
            divisor: DIVISOR,
        };
        Self { interrupt, wake, output: VecDeque::new(), woken: false, input_waits: false, lost: 0, state }
    }

    /// Its state.
    pub fn save(&self) -> SerialState {
        self.state.clone()
    }

    /// Takes a state on. Every value of it is one that a guest could have brought about, save too much
    /// input, which is cut.
    pub fn restore(&mut self, state: &SerialState) {
        self.state = SerialState { ier: state.ier & IER_MASK, mcr: state.mcr & MCR_MASK, ..state.clone() };
        self.state.input.truncate(INPUT_CAPACITY);
        self.output.clear();
        // What the host has left was to wait for the guest to read what is no longer there.
        if std::mem::take(&mut self.input_waits) {
            self.wake_vmm();
        }
        // An interrupt may have been on its way into the interrupt controller, and a driver that waited for room has it
        // now; one too many is harmless.
        self.raise_transmitter();
        if self.state.transmitter_pending || !self.state.input.is_empty() {
            self.raise();
        }
    }

    /// The descriptor the event loop watches, edge-triggered.
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// The guest reads register `offset`.
    pub fn read(&mut self, offset: u16) -> u8 {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            DATA | IER if dlab => self.state.divisor[usize::from(offset)],
            DATA => self.receive(),
            IER => self.state.ier,
            IIR => self.identify_interrupt(),
            LCR => self.state.lcr,
            MCR => self.state.mcr,
            LSR => self.line_status(),
            MSR if self.state.mcr & MCR_LOOP != 0 => self.looped_modem_status(),
            MSR => MSR_CONNECTED,
            SCR => self.state.scratch,
            _ => 0xff,
        }
    }

    /// The guest writes register `offset`.
    pub fn write(&mut self, offset: u16, value: u8) {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            DATA | IER if dlab => self.state.divisor[usize::from(offset)] = value,
            DATA => self.transmit(value),
            IER => {
                let enabled = value & !self.state.ier & IER_MASK;
                self.state.ier = value & IER_MASK;
                // Enabling an interrupt whose cause holds raises it (PC16550D §8.7): this is how
                // a driver starts to transmit, also after it stopped with one pending.
                if enabled & IER_TRANSMITTER != 0 {
                    self.state.transmitter_pending = false;
                    self.raise_transmitter();
                }
                if enabled & IER_RECEIVED != 0 && !self.state.input.is_empty() {
                    self.raise();
                }
            }
            LCR => self.state.lcr = value,
            MCR => self.state.mcr = value & MCR_MASK,
            SCR => self.state.scratch = value,
            _ => {}
        }
    }

    /// Moves up to `buffer.len()` bytes of output into `buffer`; the vmm thread calls it until it
    /// returns 0, or has itself called again.
    pub fn take_output(&mut self, buffer: &mut [u8]) -> usize {
        let was_busy = !self.transmitter_ready();
        let count = buffer.len().min(self.output.len());
        for (to, from) in buffer.iter_mut().zip(self.output.drain(..count)) {
            *to = from;
        }
        self.woken = !self.output.is_empty();
        if was_busy && self.transmitter_ready() {
            self.raise_transmitter();
        }
        count
    }

    /// Calls the vmm thread.
    pub fn wake_vmm(&self) {
        let _ = self.wake.write(1);
    }

    /// Gives the guest input; returns how much was taken.
    pub fn offer_input(&mut self, bytes: &[u8]) -> usize {
        let taken = &bytes[..bytes.len().min(self.input_room())];
        self.state.input.extend(taken);
        if !taken.is_empty() && self.state.ier & IER_RECEIVED != 0 {
            self.raise();
        }
        taken.len()
    }

    /// Bytes of input that fit now.
    pub fn input_room(&self) -> usize {
        INPUT_CAPACITY - self.state.input.len()
    }

    /// Asks for a wake once the guest has read everything; true if it has already.
    pub fn want_input(&mut self) -> bool {
        self.input_waits = !self.state.input.is_empty();
        !self.input_waits
    }

    /// Output bytes lost to a driver that does not wait, since the last call.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    fn receive(&mut self) -> u8 {
        let byte = self.state.input.pop_front().unwrap_or(0);
        if self.state.input.is_empty() && std::mem::take(&mut self.input_waits) {
            self.wake_vmm();
        }
        if !self.state.input.is_empty() && self.state.ier & IER_RECEIVED != 0 {
            self.raise();
        }
        byte
    }

    fn transmit(&mut self, value: u8) {
        if self.state.mcr & MCR_LOOP != 0 {
            self.offer_input(&[value]);
            return;
        }
        if self.output.len() < OUTPUT_CAPACITY {
            self.output.push_back(value);
        } else {
            self.lost += 1;
        }
        if !std::mem::replace(&mut self.woken, true) {
            self.wake_vmm();
        }
        if self.transmitter_ready() {
            self.raise_transmitter();
        }
    }

    fn transmitter_ready(&self) -> bool {
        self.output.len() + TRANSMIT_FIFO <= OUTPUT_CAPACITY
    }

    fn line_status(&self) -> u8 {
        let received = if self.state.input.is_empty() { 0 } else { LSR_DATA_READY };
        let transmitter = if self.transmitter_ready() { LSR_TRANSMITTER_EMPTY } else { 0 };
        received | transmitter
    }

    /// In loopback the modem outputs come back as inputs: DTR→DSR, RTS→CTS, OUT1→RI, OUT2→DCD.
    fn looped_modem_status(&self) -> u8 {
        (self.state.mcr & 1) << 5 | (self.state.mcr & 2) << 3 | (self.state.mcr & 4) << 4 | (self.state.mcr & 8) << 4
    }

    /// Reading IIR acknowledges the transmitter interrupt if that is the one it reports.
    fn identify_interrupt(&mut self) -> u8 {
        let cause = if !self.state.input.is_empty() && self.state.ier & IER_RECEIVED != 0 {
            IIR_RECEIVED
        } else if self.state.ier & IER_TRANSMITTER != 0 && std::mem::take(&mut self.state.transmitter_pending) {
            IIR_TRANSMITTER
        } else {
            IIR_NONE
        };
        cause | IIR_FIFO
    }

    fn raise_transmitter(&mut self) {
        if self.state.ier & IER_TRANSMITTER != 0 && self.transmitter_ready() && !self.state.transmitter_pending {
            self.state.transmitter_pending = true;
            self.raise();
        }
    }

    fn raise(&self) {
        (self.interrupt)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UART, and what its interrupts are counted in.
    fn serial() -> (Serial, EventFd) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (interrupts, wake) = (event(), event());
        let line = interrupts.try_clone().unwrap();
        (Serial::new(Box::new(move || line.write(1).unwrap()), wake), interrupts)
    }

    fn fired(event: &EventFd) -> bool {
        event.read().is_ok()
    }

    #[test]
    fn output_wakes_the_vmm_once_and_comes_out_in_order() {
        let (mut serial, _) = serial();
        for byte in *b"hello" {
            serial.write(DATA, byte);
        }
        assert_eq!(serial.wake_fd().read().unwrap(), 1, "one wake for the whole batch");
        let mut buffer = [0; 16];
        assert_eq!(serial.take_output(&mut buffer), 5);
        assert_eq!(&buffer[..5], b"hello");
        serial.write(DATA, b'!');
        assert!(fired(serial.wake_fd()), "the next batch wakes again");
    }

    #[test]
    fn a_guest_that_heeds_the_line_status_loses_nothing_to_a_slow_reader() {
        let (mut serial, interrupts) = serial();
        serial.write(IER, IER_TRANSMITTER);
        assert!(fired(&interrupts));
        let mut written = 0;
        while serial.read(LSR) & LSR_TRANSMITTER_EMPTY != 0 {
            for _ in 0..TRANSMIT_FIFO {
                serial.write(DATA, b'x');
                written += 1;
            }
        }
        assert_eq!(serial.take_lost(), 0);
        assert_eq!(serial.read(IIR) & 0xf, IIR_TRANSMITTER);
        while fired(&interrupts) {}
        let mut buffer = [0; 4096];
        let mut taken = serial.take_output(&mut buffer);
        assert!(fired(&interrupts), "room again: the transmitter interrupt tells the driver");
        while let count @ 1.. = serial.take_output(&mut buffer) {
            taken += count;
        }
        assert_eq!(taken, written);
    }

    #[test]
    fn a_driver_that_waited_for_a_slow_reader_goes_on_in_a_clone() {
        let (mut saved, _) = serial();
        saved.write(IER, IER_TRANSMITTER);
        while saved.read(LSR) & LSR_TRANSMITTER_EMPTY != 0 {
            saved.write(DATA, b'x');
        }
        assert_eq!(saved.read(IIR) & 0xf, IIR_TRANSMITTER);
        assert_eq!(saved.read(IIR) & 0xf, IIR_NONE);
        let (mut clone, interrupts) = serial();
        clone.restore(&saved.save());
        assert!(fired(&interrupts));
        assert_eq!(clone.read(IIR) & 0xf, IIR_TRANSMITTER);
        assert_ne!(clone.read(LSR) & LSR_TRANSMITTER_EMPTY, 0);
    }

    #[test]
    fn a_guest_that_ignores_the_line_status_is_bounded_and_its_loss_counted() {
        let (mut serial, _) = serial();
        for _ in 0..10 * OUTPUT_CAPACITY {
            serial.write(DATA, b'x');
        }
        assert_eq!(serial.take_lost() as usize, 9 * OUTPUT_CAPACITY);
    }

    #[test]
    fn input_beyond_the_fifo_waits_on_the_host_until_the_guest_has_read() {
        let (mut serial, interrupts) = serial();
        serial.write(IER, IER_RECEIVED);
        let flood = [b'a'; 1000];
        assert_eq!(serial.offer_input(&flood), INPUT_CAPACITY);
        assert_eq!(serial.offer_input(&flood), 0);
        assert!(!serial.want_input());
        assert!(fired(&interrupts));
        for _ in 0..INPUT_CAPACITY {
            assert!(!fired(serial.wake_fd()));
            assert_eq!(serial.read(IIR) & 0xf, IIR_RECEIVED);
            assert_eq!(serial.read(DATA), b'a');
        }
        assert!(fired(serial.wake_fd()), "the vmm thread may offer more");
        assert_eq!(serial.read(LSR) & LSR_DATA_READY, 0);
    }

    /// What the guest had not read, which the vmm thread waits for, is gone with the reset.
    #[test]
    fn input_that_waits_on_the_host_is_asked_for_after_a_reset() {
        let (mut serial, _) = serial();
        let state = serial.save();
        serial.offer_input(&[b'a'; 1000]);
        assert!(!serial.want_input());
        serial.restore(&state);
        assert!(fired(serial.wake_fd()));
        serial.restore(&state);
        assert!(!fired(serial.wake_fd()), "nobody waits");
    }

    #[test]
    fn sixteen_bytes_cost_one_interrupt() {
        let (mut serial, interrupts) = serial();
        serial.write(IER, IER_TRANSMITTER);
        serial.read(IIR);
        while fired(&interrupts) {}
        for _ in 0..16 {
            serial.write(DATA, b'x');
        }
        assert_eq!(interrupts.read().unwrap(), 1);
    }

    #[test]
    fn a_driver_that_stopped_with_an_interrupt_pending_can_start_again() {
        let (mut serial, interrupts) = serial();
        serial.write(IER, IER_TRANSMITTER);
        serial.read(IIR);
        serial.write(DATA, b'x');
        serial.write(IER, 0);
        while fired(&interrupts) {}
        serial.write(IER, IER_TRANSMITTER);
        assert!(fired(&interrupts));
        assert_eq!(serial.read(IIR) & 0xf, IIR_TRANSMITTER);
    }

    #[test]
    fn a_driver_probing_the_port_finds_a_16550a() {
        let (mut serial, _) = serial();
        serial.write(SCR, 0x55);
        assert_eq!(serial.read(SCR), 0x55);
        assert_eq!(serial.read(IIR) & IIR_FIFO, IIR_FIFO);
        serial.write(MCR, MCR_LOOP | 0xa);
        assert_eq!(serial.read(MSR) & 0xf0, 0x90, "RTS and OUT2 come back as CTS and DCD");
        serial.write(MCR, 0);
        serial.write(LCR, LCR_DLAB);
        serial.write(DATA, 1);
        assert_eq!((serial.read(DATA), serial.read(IER)), (1, 0));
    }
}
