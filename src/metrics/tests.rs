//! The two formats, and a metrics file that cannot keep up.

use std::os::unix::fs::OpenOptionsExt;

use super::*;

fn config(path: &std::path::Path) -> MetricsConfig {
    MetricsConfig { metrics_path: path.into(), ..Default::default() }
}

#[test]
fn a_line_says_what_was_counted_since_the_line_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let properties = vec![("team".to_owned(), "a \"b\"".to_owned())];
    let mut file = JsonLines::open(&MetricsConfig { emit_id: true, properties, ..config(&path) }, "vm-1").unwrap();
    let (one, two) = (register_block("lines_one"), register_block("lines_two"));
    for reads in [3, 4, 0] {
        one.read_count.add(reads);
        two.read_count.add(10 * reads);
        file.write().unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let reads = |drive: &str| lines.iter().map(|line| line[drive]["read_count"].as_u64().unwrap()).collect();
    let expected: [Vec<u64>; 2] = [vec![3, 4, 0], vec![30, 40, 0]];
    assert_eq!([reads("block_lines_one"), reads("block_lines_two")], expected);
    let sums: Vec<u64> = reads("block");
    assert!(sums[0] >= 33 && sums[1] >= 44, "{sums:?}");
    assert_eq!(lines[0]["id"], "vm-1");
    assert_eq!(lines[0]["properties"]["team"], "a \"b\"");
    assert!(lines[0]["utc_timestamp_ms"].as_u64().unwrap() > 1_700_000_000_000);
    assert!(text.starts_with("{\"utc_timestamp_ms\":"));
    assert_eq!(one.read_count.get(), 7);
}

#[test]
fn the_text_format_has_every_metric_once_with_its_meaning() {
    let block = register_block("text");
    block.write_bytes.add(512);
    METRICS.latencies_us.resume_vm.set(77);
    let text = openmetrics();
    assert!(text.ends_with("\n# EOF\n"));
    assert!(text.contains("\nvesicle_block_write_bytes_total{drive_id=\"text\"} 512\n"));
    assert!(text.contains("# TYPE vesicle_latencies_us_resume_vm gauge\n"));
    assert!(text.contains("\nvesicle_latencies_us_resume_vm 77\n"));
    assert!(text.contains("# HELP vesicle_vcpu_exit_io_in Exits because of an IN instruction.\n"));
    let mut families: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let count = families.len();
    families.sort_unstable();
    families.dedup();
    assert_eq!(families.len(), count);
}

#[test]
fn a_fifo_without_reader_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path());
    let error = JsonLines::open(&config(&path), "vm").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
}

#[test]
fn a_slow_reader_gets_whole_lines_and_never_blocks_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path());
    let options = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
    let mut reader = options.unwrap();
    let mut file = JsonLines::open(&config(&path), "vm").unwrap();
    let before = METRICS.logger.missed_metrics_count.get();
    while file.write().is_ok() {}
    assert!(METRICS.logger.missed_metrics_count.get() > before);
    let mut text = read_available(&mut reader);
    file.write().unwrap();
    text.push_str(&read_available(&mut reader));
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
}

fn read_available(reader: &mut std::fs::File) -> String {
    let mut bytes = Vec::new();
    let error = io::Read::read_to_end(reader, &mut bytes).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    String::from_utf8(bytes).unwrap()
}

fn fifo(dir: &std::path::Path) -> std::path::PathBuf {
    let path = dir.join("fifo");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: `name` is a NUL-terminated string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    path
}

#[test]
fn every_metric_is_counted_somewhere() {
    fn read(directory: &std::path::Path, text: &mut String) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, text);
            } else if !path.ends_with("metrics.rs") && !path.ends_with("tests.rs") {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut text = std::fs::read_to_string(source.join("metrics.rs")).unwrap();
    let (_, own) = text.split_once("impl JsonLines").unwrap();
    text = own.to_owned();
    read(&source, &mut text);
    let mut idle = Vec::new();
    METRICS.visit(Read::Total, |group, fields, _| {
        for Field { name, .. } in fields.iter() {
            // The table of endpoints names group and metric apart.
            let counted = [format!("{group}.{name}"), format!("{group} {name}"), format!(" {name}),")];
            if !counted.iter().any(|counted| text.contains(counted)) {
                idle.push(format!("{group}.{name}"));
            }
        }
    });
    idle.extend(
        Block::FIELDS
            .iter()
            .chain(Net::FIELDS.iter())
            .map(|field| format!(".{}", field.name))
            .filter(|name| !text.contains(name)),
    );
    assert!(idle.is_empty(), "{idle:?}");
}
