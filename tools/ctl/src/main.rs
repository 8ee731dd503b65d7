//! vesiclectl.
fn main() {}
