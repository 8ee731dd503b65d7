//! An i8042 keyboard controller that resets the machine and can press Ctrl-Alt-Del
//! (IBM PS/2 technical reference, "Keyboard and auxiliary device controller").

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use vmm_sys_util::eventfd::EventFd;

use super::Line;
use crate::metrics::METRICS;

/// Data port.
pub const DATA_PORT: u16 = 0x60;
/// Status (read) and command (write) port.
pub const COMMAND_PORT: u16 = 0x64;
/// The I/O APIC pin of the keyboard.
pub const KEYBOARD_IRQ: u32 = 1;

const COMMAND_READ_CONFIG: u8 = 0x20;
const COMMAND_WRITE_CONFIG: u8 = 0x60;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD: u8 = 0xab;
const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
const COMMAND_RESET_CPU: u8 = 0xfe;

const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
const STATUS_UNLOCKED: u8 = 0x10;

const CONFIG_KEYBOARD_INTERRUPT: u8 = 1;
const CONFIG_SYSTEM: u8 = 4;
const CONFIG_TRANSLATE: u8 = 0x40;
const OUTPUT_PORT_RUNNING: u8 = 1;

const KEYBOARD_ACK: u8 = 0xfa;
/// Ctrl, Alt and Del pressed and released again as the keyboard sends them, in scan code set 2.
const CTRL_ALT_DEL: &[u8] = &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
/// The same after the controller's translation to set 1.
const CTRL_ALT_DEL_TRANSLATED: &[u8] = &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
/// What the controller holds before it drops answers: a guest that never reads loses them.
const CAPACITY: usize = 16;

/// What the controller holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    output: VecDeque<u8>,
    config: u8,
    output_port: u8,
    /// The command whose parameter the next write to the data port is.
    awaiting: Option<u8>,
}

/// The controller.
pub struct I8042 {
    interrupt: Line,
    reset: EventFd,
    state: I8042State,
}

impl I8042 {
    /// A controller that interrupts through `interrupt` and asks for a reset through `reset`.
    pub fn new(interrupt: Line, reset: EventFd) -> Self {
        // As firmware leaves it.
        let state = I8042State {
            output: VecDeque::with_capacity(CAPACITY),
            config: CONFIG_KEYBOARD_INTERRUPT | CONFIG_SYSTEM | CONFIG_TRANSLATE,
            output_port: OUTPUT_PORT_RUNNING,
            awaiting: None,
        };
        Self { interrupt, reset, state }
    }

    /// Its state.
    pub fn save(&self) -> I8042State {
        self.state.clone()
    }

    /// Takes a state on; more keys than it can hold are cut.
    pub fn restore(&mut self, state: &I8042State) {
        self.state = state.clone();
        self.state.output.truncate(CAPACITY);
        // See `Serial::restore`.
        if !self.state.output.is_empty() {
            self.raise();
        }
    }

    /// Signalled when the guest resets the machine.
    pub fn reset_fd(&self) -> &EventFd {
        &self.reset
    }

    /// The guest reads [`DATA_PORT`] or [`COMMAND_PORT`].
    pub fn read(&mut self, port: u16) -> u8 {
        METRICS.i8042.read_count.inc();
        if port == COMMAND_PORT {
            let full = if self.state.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
            return full | STATUS_SYSTEM | STATUS_UNLOCKED;
        }
        let byte = self.state.output.pop_front().unwrap_or(0);
        if !self.state.output.is_empty() {
            self.raise();
        }
        byte
    }

    /// The guest writes [`DATA_PORT`] or [`COMMAND_PORT`].
    pub fn write(&mut self, port: u16, value: u8) {
        METRICS.i8042.write_count.inc();
        if port == COMMAND_PORT {
            return self.command(value);
        }
        match self.state.awaiting.take() {
            Some(COMMAND_WRITE_CONFIG) => self.state.config = value,
            Some(COMMAND_WRITE_OUTPUT_PORT) => {
                self.state.output_port = value;
                if value & OUTPUT_PORT_RUNNING == 0 {
                    self.request_reset();
                }
            }
            // For the keyboard, which agrees to everything.
            _ => self.answer(&[KEYBOARD_ACK]),
        }
    }

    /// Presses and releases Ctrl-Alt-Del. Returns false, and does nothing, when the guest has left
    /// no room for it.
    pub fn press_ctrl_alt_del(&mut self) -> bool {
        let keys = if self.state.config & CONFIG_TRANSLATE == 0 { CTRL_ALT_DEL } else { CTRL_ALT_DEL_TRANSLATED };
        if self.state.output.len() + keys.len() > CAPACITY {
            return false;
        }
        self.answer(keys);
        true
    }

    fn command(&mut self, command: u8) {
        self.state.awaiting = None;
        match command {
            COMMAND_READ_CONFIG => self.answer(&[self.state.config]),
            COMMAND_WRITE_CONFIG | COMMAND_WRITE_OUTPUT_PORT => self.state.awaiting = Some(command),
            COMMAND_SELF_TEST => self.answer(&[0x55]),
            COMMAND_TEST_KEYBOARD => self.answer(&[0]),
            COMMAND_READ_OUTPUT_PORT => self.answer(&[self.state.output_port]),
            COMMAND_RESET_CPU => self.request_reset(),
            _ => {}
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.state.output.len() + bytes.len() <= CAPACITY {
            self.state.output.extend(bytes);
            self.raise();
        }
    }

    fn raise(&self) {
        if self.state.config & CONFIG_KEYBOARD_INTERRUPT != 0 {
            (self.interrupt)();
        }
    }

    fn request_reset(&self) {
        METRICS.i8042.reset_count.inc();
        let _ = self.reset.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A controller, and what its interrupts are counted in.
    fn controller() -> (I8042, EventFd) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (interrupts, reset) = (event(), event());
        let line = interrupts.try_clone().unwrap();
        (I8042::new(Box::new(move || line.write(1).unwrap()), reset), interrupts)
    }

    #[test]
    fn a_driver_reads_back_the_configuration_it_wrote() {
        let (mut i8042, _) = controller();
        i8042.write(COMMAND_PORT, COMMAND_READ_CONFIG);
        assert_eq!(i8042.read(COMMAND_PORT) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(i8042.read(DATA_PORT), 0x45);
        i8042.write(COMMAND_PORT, COMMAND_WRITE_CONFIG);
        i8042.write(DATA_PORT, 0x74);
        i8042.write(COMMAND_PORT, COMMAND_READ_CONFIG);
        assert_eq!(i8042.read(DATA_PORT), 0x74);
        assert_eq!(i8042.read(COMMAND_PORT) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn both_ways_to_reset_reach_the_vmm() {
        let (mut i8042, _) = controller();
        i8042.write(COMMAND_PORT, COMMAND_RESET_CPU);
        assert!(i8042.reset_fd().read().is_ok());
        i8042.write(COMMAND_PORT, COMMAND_WRITE_OUTPUT_PORT);
        i8042.write(DATA_PORT, 0);
        assert!(i8042.reset_fd().read().is_ok());
    }

    #[test]
    fn ctrl_alt_del_is_read_key_by_key_and_refused_while_unread() {
        let (mut i8042, interrupts) = controller();
        assert!(i8042.press_ctrl_alt_del() && i8042.press_ctrl_alt_del());
        assert!(!i8042.press_ctrl_alt_del(), "a guest that does not read does not grow memory");
        let mut keys = Vec::new();
        while i8042.read(COMMAND_PORT) & STATUS_OUTPUT_FULL != 0 {
            assert!(interrupts.read().is_ok(), "an interrupt for every byte");
            keys.push(i8042.read(DATA_PORT));
        }
        assert_eq!(keys, [CTRL_ALT_DEL_TRANSLATED, CTRL_ALT_DEL_TRANSLATED].concat());
    }

    #[test]
    fn a_driver_that_wants_no_translation_gets_the_keyboards_own_codes() {
        let (mut i8042, _) = controller();
        i8042.write(COMMAND_PORT, COMMAND_WRITE_CONFIG);
        i8042.write(DATA_PORT, CONFIG_KEYBOARD_INTERRUPT);
        assert!(i8042.press_ctrl_alt_del());
        let keys: Vec<_> = CTRL_ALT_DEL.iter().map(|_| i8042.read(DATA_PORT)).collect();
        assert_eq!(keys, CTRL_ALT_DEL);
    }

    #[test]
    fn garbage_neither_resets_nor_grows() {
        let (mut i8042, _) = controller();
        for value in (0..=u8::MAX).filter(|v| ![COMMAND_RESET_CPU, COMMAND_WRITE_OUTPUT_PORT].contains(v)) {
            i8042.write(COMMAND_PORT, value);
            i8042.write(DATA_PORT, value);
        }
        assert!(i8042.state.output.len() <= CAPACITY);
        assert!(i8042.reset_fd().read().is_err());
    }
}
