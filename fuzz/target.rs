//! Every target: which of the properties it runs, its name says.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vesicle::fuzzing::run(env!("CARGO_BIN_NAME"), bytes));
