//! Images made of layers and layouts that are put together here, and looked at with debugfs.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::tree::{Node, Tree};
use super::{Build, Error, layer};

/// A layer in the making. Names are taken as they are, whatever they say.
#[derive(Default)]
struct Layer(Vec<u8>);

impl Layer {
    fn entry(mut self, kind: EntryType, name: &str, link: &str, content: &[u8], change: impl Fn(&mut Header)) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, "", content.as_bytes(), |_| {})
    }

    fn dir(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"", |_| {})
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"", |_| {})
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"", |_| {})
    }

    fn pax(self, key: &str, value: &[u8]) -> Self {
        let mut record = [format!(" {key}=").as_bytes(), value, b"\n"].concat();
        let mut length = record.len();
        while length != record.len() + length.to_string().len() {
            length = record.len() + length.to_string().len();
        }
        record.splice(0..0, length.to_string().into_bytes());
        self.entry(EntryType::XHeader, "pax", "", &record, |_| {})
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn tree() -> (TempDir, Tree) {
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(dir.path().join("files")).unwrap();
    (dir, tree)
}

/// What the layers come to: names with their contents or targets.
fn listing(layers: &[Vec<u8>]) -> Result<Vec<String>, Error> {
    let (_dir, mut tree) = tree();
    for bytes in layers {
        layer::apply(&mut tree, &mut &bytes[..])?;
    }
    let mut lines = Vec::new();
    list(&tree, &tree.root, "", &mut lines);
    Ok(lines)
}

fn list(tree: &Tree, node: &Node, path: &str, lines: &mut Vec<String>) {
    for (name, child) in node.children.iter().flatten() {
        let path = format!("{path}{}", name.to_string_lossy());
        match &tree.inodes[child.inode].kind {
            super::tree::Kind::Directory => {
                lines.push(format!("{path}/"));
                list(tree, child, &format!("{path}/"), lines);
            }
            super::tree::Kind::File(_) => {
                let content = fs::read_to_string(tree.store.join(child.inode.to_string())).unwrap();
                lines.push(if content.is_empty() { path } else { format!("{path}={content}") });
            }
            super::tree::Kind::Link(target) => lines.push(format!("{path}->{}", String::from_utf8_lossy(target))),
            other => lines.push(format!("{path} {other:?}")),
        }
    }
}

/// What is said about layers that cannot be applied, with its causes.
fn complaint(layers: &[Vec<u8>]) -> String {
    chain(&listing(layers).unwrap_err())
}

#[test]
fn layers_add_replace_and_take_away() {
    let lower = Layer::default().dir("etc/").file("etc/a", "1").file("etc/b", "1").dir("var").file("var/x", "1").end();
    let upper =
        Layer::default().file("./etc/b", "2").file("etc/.wh.a", "").file("var", "a file").file("/new/c", "3").end();
    assert_eq!(listing(&[lower.clone(), upper]).unwrap(), ["etc/", "etc/b=2", "new/", "new/c=3", "var=a file"]);
    let upper = Layer::default().file(".wh.etc", "").file("etc/c", "2").file(".wh.nothing", "").end();
    assert_eq!(listing(&[lower, upper]).unwrap(), ["etc/", "etc/c=2", "var/", "var/x=1"]);
}

#[test]
fn a_whiteout_takes_nothing_of_its_own_layer_wherever_it_stands() {
    let lower = Layer::default().file("d/old", "1").file("d/sub/old", "1").file("e", "1").end();
    let opaque_last = Layer::default().file("d/new", "2").file("d/sub/new", "2").file("d/.wh..wh..opq", "");
    let opaque_first = Layer::default().file("d/.wh..wh..opq", "").file("d/new", "2").file("d/sub/new", "2");
    for upper in [opaque_last, opaque_first] {
        let upper = upper.file("e", "2").file(".wh.e", "").file("d/.wh..wh.plnk", "").end();
        assert_eq!(listing(&[lower.clone(), upper]).unwrap(), ["d/", "d/new=2", "d/sub/", "d/sub/new=2", "e=2"]);
    }
}

#[test]
fn links_are_followed_inside_of_the_image_and_never_out_of_it() {
    let lower = Layer::default().dir("usr/lib").symlink("lib", "usr/lib").symlink("out", "../../../../usr").end();
    let upper =
        Layer::default().file("lib/a", "1").file("out/lib/b", "2").symlink("abs", "/usr/./lib").file("abs/c", "3");
    let names = ["abs->/usr/./lib", "lib->usr/lib", "out->../../../../usr", "usr/", "usr/lib/"];
    let files = ["usr/lib/a=1", "usr/lib/b=2", "usr/lib/c=3"];
    assert_eq!(listing(&[lower.clone(), upper.end()]).unwrap(), [&names[..], &files].concat());
    // The link itself is what a name at the end means.
    let upper = Layer::default().file("lib", "a file").file(".wh.out", "").end();
    assert_eq!(listing(&[lower, upper]).unwrap(), ["lib=a file", "usr/", "usr/lib/"]);
}

#[test]
fn hostile_layers_are_refused_in_words() {
    let dots = |name| Layer::default().file(name, "x").end();
    let loops = Layer::default().symlink("a", "b").symlink("b", "a").file("a/x", "1").end();
    let outside = Layer::default().hard_link("x", "../../etc/passwd").end();
    let strange = Layer::default().entry(EntryType::new(b'Z'), "z", "", b"", |_| {}).end();
    let owner = Layer::default().entry(EntryType::Regular, "o", "", b"", |h| h.set_uid(1 << 32)).end();
    let device = Layer::default().entry(EntryType::Char, "d", "", b"", |h| h.set_device_major(1 << 12).unwrap()).end();
    let hard_link = Layer::default().dir("d").hard_link("d2", "d").end();
    let deep = Layer::default().pax("path", "d/".repeat(257).as_bytes()).dir("d").end();
    let long = Layer::default().pax("path", "n".repeat(256).as_bytes()).dir("d").end();
    let attribute = Layer::default().pax("SCHILY.xattr.user.a", b"a\nb").file("a", "").end();
    let command = format!("SCHILY.xattr.user.{}!id #", " ".repeat(8300));
    let command = Layer::default().pax(&command, b"").file("a", "").end();
    for (layer, words) in [
        (dots("../escape"), "\"../escape\" is no name in an image"),
        (dots("a/../../escape"), "is no name in an image"),
        (dots("d/.wh..."), "takes away nothing that has a name"),
        (Layer::default().file("f", "").file("f/x", "1").end(), "\"f/x\" is below a file"),
        (Layer::default().file("./", "1").end(), "takes the place of the root directory"),
        (Layer::default().symlink("/", "/etc").end(), "takes the place of the root directory"),
        (loops, "leads through too many links"),
        (outside, "\"x\" is a hard link to what is not there"),
        (hard_link, "is a hard link to a directory"),
        (strange, "is of a kind that file systems do not have"),
        (owner, "has an owner that Linux has no number for"),
        (device, "has numbers that no device here can have"),
        (deep, "leads too deep"),
        (long, "is too long"),
        (attribute, "has extended headers that cannot be read"),
        (command, "\"a\" has an extended attribute with too long a name"),
        (vec![b'x'; 4096], "it is damaged, or no tar archive"),
    ] {
        let said = complaint(std::slice::from_ref(&layer));
        assert!(said.contains(words), "{words:?} is not in {said:?}");
    }
}

#[test]
fn archives_that_end_early_or_say_too_much_are_refused() {
    let whole = Layer::default().file("a", &"x".repeat(2000)).end();
    assert!(complaint(&[whole[..1000].to_vec()]).contains("is cut short"));
    assert!(complaint(&[whole[..300].to_vec()]).contains("damaged"));
    // A name of 10 MiB, and one that only says so.
    let name = vec![b'n'; 10 << 20];
    let long = Layer::default().entry(EntryType::GNULongName, "././@LongLink", "", &name, |_| {}).file("a", "").end();
    assert!(complaint(&[long]).contains("more than 1048576 bytes of headers"));
    // No layer here is as long as it takes, so they begin near the end.
    let (_dir, mut tree) = tree();
    tree.content = super::tree::MAX_CONTENT - 10;
    tree.begin_layer();
    let bytes = Layer::default().file("a", "0123456789").file("b", "0").end();
    let error = layer::apply(&mut tree, &mut &bytes[..]).unwrap_err();
    assert!(matches!(error, Error::Bomb { what: "bytes", .. }), "{error}");
    let (_dir, mut tree) = self::tree();
    tree.names = super::tree::MAX_NAMES - 1000;
    let bytes = (0..5).fold(Layer::default(), |layer, n| layer.symlink(&format!("l{n}"), "target")).end();
    assert!(matches!(layer::apply(&mut tree, &mut &bytes[..]).unwrap_err(), Error::Bomb { .. }));
}

#[test]
fn compressed_layers_are_found_by_their_content() {
    let plain = Layer::default().file("a", &"1".repeat(300_000)).end();
    let mut gzip = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let zstd = |part: &[u8]| {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(part, level)
    };
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let frames = [zstd(&plain[..1000]), skipped.clone(), zstd(&plain[1000..]), skipped].concat();
    let expected = listing(std::slice::from_ref(&plain)).unwrap();
    for compressed in [gzip.finish().unwrap(), zstd(&plain), frames.clone()] {
        assert!(compressed.len() < plain.len() / 2);
        assert!(listing(&[compressed]).unwrap() == expected);
    }
    assert!(listing(&[frames[..frames.len() / 2].to_vec()]).is_err());
}

/// A layout in a directory.
struct Layout(TempDir);

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        Self(dir)
    }

    fn of(layers: &[Vec<u8>]) -> Self {
        let layout = Self::new();
        let manifest = layout.manifest(layers);
        layout.index(&json!([manifest]));
        layout
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn blob(&self, bytes: &[u8]) -> String {
        let sum: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(self.path().join("blobs/sha256").join(&sum), bytes).unwrap();
        format!("sha256:{sum}")
    }

    fn manifest(&self, layers: &[Vec<u8>]) -> Value {
        let layers: Vec<_> = layers.iter().map(|layer| json!({ "digest": self.blob(layer) })).collect();
        json!({ "digest": self.blob(json!({ "layers": layers }).to_string().as_bytes()) })
    }

    fn index(&self, manifests: &Value) {
        fs::write(self.path().join("index.json"), json!({ "manifests": manifests }).to_string()).unwrap();
    }

    /// The blob of the first layer.
    fn first_layer(&self) -> PathBuf {
        let layers = super::Layout::open(self.path()).unwrap().layers(None).unwrap();
        self.path().join("blobs").join(layers[0].to_string().replace(':', "/"))
    }

    /// The same in a tar.
    fn archive(&self) -> PathBuf {
        let path = self.path().with_extension("tar");
        let mut archive = tar::Builder::new(fs::File::create(&path).unwrap());
        archive.append_dir_all(".", self.path()).unwrap();
        archive.finish().unwrap();
        path
    }
}

/// Builds an image of `source` with these options.
fn build(source: &Path, options: &[&str]) -> Result<(TempDir, PathBuf), String> {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("image");
    let mut words: Vec<std::ffi::OsString> = vec!["build".into(), "--output".into(), output.clone().into()];
    words.extend(options.iter().map(Into::into));
    words.push(source.into());
    let build = Build::parse(&mut lexopt::Parser::from_args(words)).unwrap().unwrap();
    let built = build.run();
    // Nothing else is left beside it, whatever came of it.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), usize::from(built.is_ok()));
    built.map(|()| (dir, output)).map_err(|error| chain(&error))
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}

fn tool(name: &str, words: &[&str]) -> String {
    let mut command = Command::new(name);
    command.args(words).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What debugfs says of a file in an image: words that are compared without the spaces between them.
fn debugfs(image: &Path, request: &str) -> String {
    let said = tool("debugfs", &["-R", request, image.to_str().unwrap()]);
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn check(image: &Path) {
    tool("e2fsck", &["-fn", image.to_str().unwrap()]);
}

#[test]
fn an_image_has_what_its_layers_say_and_not_what_its_builder_is() {
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let owned = |uid, gid, mode| {
        move |header: &mut Header| {
            header.set_uid(uid);
            header.set_gid(gid);
            header.set_mode(mode);
        }
    };
    let device = |major, minor| {
        move |header: &mut Header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
            header.set_mode(0o660);
            header.set_gid(6);
        }
    };
    let layer = Layer::default()
        .entry(EntryType::Directory, "./", "", b"", owned(3, 4, 0o711))
        .entry(EntryType::Directory, "srv", "", b"", owned(70_000, 80_000, 0o2070))
        .entry(EntryType::Regular, "srv/su", "", b"su", owned(0, 42, 0o4755))
        .entry(EntryType::Regular, "srv/secret", "", b"secret", owned(33, 33, 0))
        .entry(EntryType::Symlink, "srv/link", "su", b"", owned(5, 5, 0o777))
        .hard_link("srv/su2", "srv/su")
        .entry(EntryType::Char, "srv/null", "", b"", device(1, 300))
        .entry(EntryType::Block, "srv/disk", "", b"", device(259, 60_000))
        .entry(EntryType::Fifo, "srv/fifo", "", b"", owned(7, 0, 0o600))
        .file("srv/it's \"quoted\" $x `y` \\", "odd")
        .pax("SCHILY.xattr.security.capability", capability)
        .file("srv/ping", "ping")
        .file("etc/resolv.conf", "theirs")
        .end();
    let (_dir, image) = build(Layout::of(&[layer]).path(), &[]).unwrap();
    check(&image);
    for (path, words) in [
        ("/", "Mode: 0711"),
        ("/", "User: 3 Group: 4"),
        ("/srv", "Type: directory Mode: 02070"),
        ("/srv", "User: 70000 Group: 80000"),
        ("/srv/su", "Type: regular Mode: 04755"),
        ("/srv/su2", "User: 0 Group: 42"),
        ("/srv/su2", "Links: 2"),
        ("/srv/su", "mtime: 0x6553f100"),
        ("/srv/secret", "Mode: 0000"),
        ("/srv/link", "Type: symlink Mode: 0777"),
        ("/srv/link", "User: 5 Group: 5"),
        ("/srv/null", "Type: character special Mode: 0660"),
        ("/srv/null", "major/minor number: 01:300"),
        ("/srv/disk", "major/minor number: 259:60000"),
        ("/srv/fifo", "Type: FIFO Mode: 0600"),
        ("/srv/fifo", "User: 7"),
        ("/srv/ping", "security.capability (20)"),
        ("/tmp", "Mode: 01777"),
        ("/proc", "Type: directory Mode: 0555"),
    ] {
        let said = debugfs(&image, &format!("stat {path}"));
        assert!(said.contains(words), "{path}: {words:?} is not in {said}");
    }
    assert_eq!(debugfs(&image, "cat /srv/secret"), "secret");
    assert_eq!(debugfs(&image, "cat /etc/resolv.conf"), "theirs");
    assert_eq!(debugfs(&image, r#"cat "/srv/it's ""quoted"" $x `y` \""#), "odd");
}

#[test]
fn a_layout_is_read_from_a_directory_and_from_a_tar() {
    let layers = [Layer::default().file("a", "1").end(), Layer::default().file("a", "2").end()];
    let layout = Layout::of(&layers);
    for source in [layout.path().to_owned(), layout.archive()] {
        let (_dir, image) = build(&source, &["--size", "24"]).unwrap();
        check(&image);
        assert_eq!(fs::metadata(&image).unwrap().len(), 24 << 20);
        assert_eq!(debugfs(&image, "cat /a"), "2");
    }
    fs::remove_file(layout.path().with_extension("tar")).unwrap();
}

#[test]
fn of_several_images_the_fitting_or_the_named_one_is_taken() {
    let layout = Layout::new();
    let mut manifests: Vec<_> =
        ["arm", "amd", "other"].iter().map(|name| layout.manifest(&[Layer::default().file(name, "").end()])).collect();
    manifests[0]["platform"] = json!({ "os": "linux", "architecture": "arm64" });
    manifests[1]["platform"] = json!({ "os": "linux", "architecture": "amd64" });
    let nested = json!({ "manifests": [manifests[0], manifests[1]] });
    let mut nested = json!({ "digest": layout.blob(nested.to_string().as_bytes()) });
    nested["annotations"] = json!({ "org.opencontainers.image.ref.name": "multi" });
    layout.index(&json!([nested]));
    let (_dir, image) = build(layout.path(), &[]).unwrap();
    assert!(debugfs(&image, "ls -p /").contains("/amd/"));

    manifests[2]["annotations"] = json!({ "org.opencontainers.image.ref.name": "other:1" });
    layout.index(&json!([nested, manifests[2]]));
    assert_eq!(build(layout.path(), &[]).unwrap_err(), "name one of several images with --ref: multi, other:1");
    let (_dir, image) = build(layout.path(), &["--ref", "other:1"]).unwrap();
    assert!(debugfs(&image, "ls -p /").contains("/other/"));
    assert!(build(layout.path(), &["--ref", "third"]).unwrap_err().contains("no image \"third\" for linux/amd64"));
    layout.index(&json!([manifests[0]]));
    assert!(build(layout.path(), &[]).unwrap_err().contains("no image for linux/amd64"));
}

#[test]
fn a_layout_that_is_not_what_it_says_is_refused() {
    let layout = Layout::of(&[Layer::default().file("a", "1").end()]);
    let blob = layout.first_layer();
    let whole = fs::read(&blob).unwrap();
    // A change that the archive does not show, then a missing end, then all of it.
    let mut changed = whole.clone();
    *changed.last_mut().unwrap() = 1;
    for damaged in [&changed[..], &whole[..whole.len() - 1]] {
        fs::write(&blob, damaged).unwrap();
        let said = build(layout.path(), &[]).unwrap_err();
        assert!(said.contains("cannot be applied: the blob sha256:") && said.contains("is damaged"), "{said}");
    }
    fs::remove_file(&blob).unwrap();
    assert!(build(layout.path(), &[]).unwrap_err().contains("is missing"));
    tool("mkfifo", &[blob.to_str().unwrap()]);
    assert!(build(layout.path(), &[]).unwrap_err().contains("it is no regular file"));

    for (manifests, words) in [
        (json!([{ "digest": "sha256:../../../../etc/passwd" }]), "is no digest"),
        (json!([{ "digest": format!("sha256:{}", "G".repeat(64)) }]), "is no digest"),
        (json!([{}]), "is no digest"),
        (json!([]), "no image for linux/amd64"),
        (json!(3), "the manifest has no layers"),
    ] {
        layout.index(&manifests);
        let said = build(layout.path(), &[]).unwrap_err();
        assert!(said.contains(words), "{words:?} is not in {said:?}");
    }
    fs::write(layout.path().join("index.json"), vec![b' '; (4 << 20) + 1]).unwrap();
    assert!(build(layout.path(), &[]).unwrap_err().contains("too long for a document"));
    fs::write(layout.path().join("index.json"), "[".repeat(100_000)).unwrap();
    assert!(build(layout.path(), &[]).unwrap_err().contains("is no JSON document"));
    let no_layout = layout.path().join("oci-layout");
    assert!(build(&no_layout, &[]).unwrap_err().contains("damaged, or no tar"));
    assert!(build(Path::new("/nonexistent"), &[]).unwrap_err().contains("cannot read /nonexistent"));
}

#[test]
fn a_directory_becomes_an_image_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("etc/sub dir")).unwrap();
    fs::write(root.join("etc/sub dir/file"), "text").unwrap();
    fs::set_permissions(root.join("etc/sub dir/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::symlink("/etc/shadow", root.join("etc/link")).unwrap();
    std::os::unix::fs::symlink("../run/resolv.conf", root.join("etc/resolv.conf")).unwrap();
    let (_out, image) = build(&root, &[]).unwrap();
    check(&image);
    assert_eq!(debugfs(&image, "cat \"/etc/sub dir/file\""), "text");
    let said = debugfs(&image, "stat \"/etc/sub dir/file\"");
    assert!(said.contains("Mode: 04711") && said.contains("User: 0 Group: 0"), "{said}");
    assert!(debugfs(&image, "stat /etc/link").contains("Fast link dest: \"/etc/shadow\""));
    assert!(debugfs(&image, "stat /etc/resolv.conf").contains("Type: symlink"));
    for mount_point in ["dev", "proc", "sys", "run", "tmp"] {
        assert!(debugfs(&image, &format!("stat /{mount_point}")).contains("Type: directory"), "{mount_point}");
        assert!(!root.join(mount_point).exists());
    }
    fs::write(root.join("run"), "in the way").unwrap();
    assert_eq!(build(&root, &[]).unwrap_err(), "\"/run\" has to be a directory");
}

#[test]
fn an_image_that_does_not_come_about_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let (root, output) = (dir.path().join("root"), dir.path().join("image"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("large"), vec![1; 9 << 20]).unwrap();
    fs::write(&output, "old").unwrap();
    let build = |output: &Path, size_mib| Build {
        source: root.clone(),
        output: output.to_owned(),
        size_mib: Some(size_mib),
        reference: None,
    };
    let said = build(&output, 8).run().unwrap_err().to_string();
    assert!(said.starts_with("mke2fs failed on an image of 8 MiB: "), "{said}");
    assert!(matches!(build(&output, u64::MAX).run(), Err(Error::TooLarge(_))));
    assert_eq!(fs::read(&output).unwrap(), b"old");
    let inside = build(&root.join("image"), 32).run().unwrap_err();
    assert!(matches!(inside, Error::Inside(_)), "{inside}");
    build(&output, 32).run().unwrap();
    let meta = fs::metadata(&output).unwrap();
    assert!(meta.len() == 32 << 20 && meta.blocks() * 512 < 20 << 20, "{meta:?}");
    check(&output);
}
