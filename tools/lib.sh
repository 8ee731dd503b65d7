# shellcheck shell=bash
# What the tools share; they source this file first. Strict mode, the checkout's root, the cache, progress, packages.
set -euo pipefail
shopt -s inherit_errexit

# shellcheck disable=SC2034  # used where this is sourced
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tool=${0##*/}

# A service or a bare container may start us with neither a home nor the administrator's directories.
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}
[[ :$PATH: == *:/usr/sbin:* ]] || PATH+=:/usr/local/sbin:/usr/sbin:/sbin
export PATH
cache=$(realpath -m "${VESICLE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vesicle}")

say() { printf '%s: %s\n' "$tool" "$*" >&2; }
die() { say "$@"; exit 1; }

# as_root COMMAND…: as root, through sudo when we are not; fails where nobody could give a password.
as_root() {
  if ((EUID == 0)); then "$@"
  elif ! command -v sudo >/dev/null; then return 1
  elif sudo -n true 2>/dev/null; then sudo -n "$@"
  elif [[ -t 0 && -t 2 ]]; then sudo "$@"
  else return 1; fi
}

# apt COMMAND…: apt-get without questions and without chatter; it waits for others that install something.
apt() {
  as_root env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get -qq -y --no-install-recommends \
    -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" >/dev/null
}

# Package lists are refreshed at most once in a run, and only after something was not found in the ones at hand.
lists_are_fresh=
refresh_lists() {
  local said deadline=$((SECONDS + 300))
  [[ -z $lists_are_fresh ]] || return 1
  lists_are_fresh=1
  say "refreshing the package lists"
  # A password is asked for here, if at all: below nobody would see it. The lists have a lock of their own, for which
  # apt-get does not wait.
  as_root true || return
  until said=$(apt update 2>&1); do
    if [[ $said != *"Could not get lock"* ]] || ((SECONDS > deadline)); then say "$said"; return 1; fi
    sleep 1
  done
}

# need PACKAGE:COMMAND|/FILE…: each command or file is there afterwards, its Debian package installed if it was not.
need() {
  local item missing=()
  for item; do
    if [[ ${item#*:} == /* ]]; then [[ -e ${item#*:} ]]; else command -v "${item#*:}" >/dev/null; fi ||
      missing+=("${item%%:*}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || die "missing: ${missing[*]} (Debian's names; there is no apt-get here)"
  say "installing ${missing[*]}"
  apt install "${missing[@]}" 2>/dev/null || { refresh_lists && apt install "${missing[@]}"; } ||
    die "packages are missing; as root: apt-get install ${missing[*]}"
}

# need_toolchain: cargo, and what it takes to link a static binary. Sets $target, for which cargo builds from then on:
# the one of .cargo/config.toml, or, where its standard library is not to be had, glibc's.
need_toolchain() {
  command -v cargo >/dev/null || PATH=$HOME/.cargo/bin:$PATH
  command -v cargo >/dev/null || die "cargo is missing: install Rust as CONTRIBUTING.md says, then run this again"
  need gcc:cc libc6-dev:/usr/include/stdio.h
  target=${CARGO_BUILD_TARGET:-x86_64-unknown-linux-musl}
  if [[ ! -d $(rustc --print sysroot)/lib/rustlib/$target ]]; then
    say "adding Rust's standard library for $target"
    rustup --quiet target add "$target" >&2 || {
      target=x86_64-unknown-linux-gnu
      say "there is none to be had; building for $target, which starts in twice the time"
    }
  fi
  export CARGO_BUILD_TARGET=$target
}

# once DIR COMMAND…: if DIR does not exist, COMMAND makes its content in the directory given to it as last argument.
# Whoever comes second waits for the first; DIR is never seen half made.
once() {
  local dir=$1 lock
  shift
  [[ ! -d $dir ]] || return 0
  mkdir -p "${dir%/*}"
  exec {lock}>"$dir.lock"
  flock "$lock"
  if [[ ! -d $dir ]]; then
    (
      # Hidden from patterns such as those of `unpacked`.
      made=$(mktemp -d "${dir%/*}/.${dir##*/}.XXXXXX")
      trap 'rm -rf "$made"' EXIT
      chmod 755 "$made"
      # Jails have users of their own, who read what is kept.
      umask 022
      "$@" "$made" >&2
      mv -T "$made" "$dir"
    )
  fi
  exec {lock}>&-
}

# newest_package REGEX: the name, among the packages known here, that sorts last.
newest_package() {
  apt-cache pkgnames | grep -E "^$1\$" | sort -V | tail -1 || true
}

# unpacked PACKAGE: prints a directory with the content of a Debian package, which is fetched but not installed.
# The name may be a regular expression; where no package has it, the exit status is 3. A version that was fetched once
# is used until the cache is emptied.
unpacked() {
  local dir name
  for dir in "$cache"/packages/*/; do
    [[ ! $(basename "$dir") =~ ^$1_[^_]*$ ]] || { echo "${dir%/}"; return; }
  done
  command -v apt-get >/dev/null || die "cannot fetch the Debian package $1: there is no apt-get here"
  name=$(newest_package "$1")
  if [[ -z $name ]]; then
    refresh_lists || true
    name=$(newest_package "$1")
  fi
  [[ -n $name ]] || { say "the package lists know no $1"; exit 3; }
  # Named like the package's file, without the architecture: what is made from it can depend on its version.
  dir=$cache/packages/$(apt-get -qq download --print-uris "$name" | cut -d' ' -f2 | sed 's/_[^_]*$//')
  once "$dir" fetch_package "$name"
  echo "$dir"
}

fetch_package() {
  local dir
  say "fetching $1"
  cd "$2"
  apt-get -qq download "$1" >/dev/null 2>&1 || { refresh_lists && apt-get -qq download "$1" >/dev/null 2>&1; } ||
    die "cannot fetch the package $1"
  dpkg -x ./*.deb .
  rm ./*.deb
  # From Debian 13 on packages have no /bin and /lib of their own.
  for dir in bin lib; do
    [[ -e $dir || ! -d usr/$dir ]] || ln -s "usr/$dir" "$dir"
  done
  # A kernel package leaves its module index to the installation, which does not happen here.
  if [[ -d lib/modules ]]; then
    need kmod:depmod
    depmod -b . "$(ls lib/modules)"
  fi
}

# cloud_kernel SERIES: prints the directory of Debian's newest cloud kernel of that series, such as 6.12.
cloud_kernel() { unpacked "linux-image-${1//./\\.}\.[0-9].*-cloud-amd64"; }

# vmlinux KERNEL_DIR: prints the ELF image of a kernel package. Its bzImage unpacks itself to that whenever it boots, which
# takes a good part of the boot.
vmlinux() {
  local image dir key
  image=$(echo "$1"/boot/vmlinuz-*)
  key=$({ echo "$image"; cat "$root/tools/lib.sh"; } | sha256sum)
  dir=$cache/guest/vmlinux-${key:0:16}
  once "$dir" unpack_vmlinux "$image"
  echo "$dir/vmlinux"
}

# Linux boot protocol: setup_sects, payload_offset and payload_length. The payload ends with its size when unpacked.
unpack_vmlinux() {
  local sectors offset length
  read -r sectors < <(od -An -tu1 -j 0x1f1 -N 1 "$1")
  read -r offset length < <(od -An -tu4 -j 0x248 -N 8 "$1")
  offset=$((offset + 512 * (sectors + 1)))
  if [[ $(od -An -tx4 -j "$offset" -N 4 "$1") == *fd2fb528 ]]; then
    need zstd:zstd
    dd if="$1" iflag=skip_bytes,count_bytes skip="$offset" count="$((length - 4))" bs=1M status=none |
      zstd -dc >"$2/vmlinux"
  else
    # Compressed by other means than zstd, it boots as it is.
    ln -s "$1" "$2/vmlinux"
  fi
}

busybox() {
  local dir
  dir=$(unpacked busybox-static)
  echo "$dir/bin/busybox"
}

# copy_modules KERNEL_DIR DEST MODULE…: the modules and all they depend on, unpacked as DEST/NN-name.ko, where the
# numbers give the order to load them in. What the kernel has built in, and what it does not know, is left out. So are
# the signatures: to check them takes an emulated CPU most of its time to load a module.
copy_modules() {
  local dir=$1 dest=$2 version module file number=10
  shift 2
  need kmod:modprobe xz-utils:xz binutils:strip
  version=$(ls "$dir/lib/modules")
  mkdir -p "$dest"
  for module; do
    while read -r _ file _; do
      file=$(realpath "$file")
      module=$(basename "${file%%.ko*}")
      ! compgen -G "$dest/*-$module.ko" >/dev/null || continue
      case $file in
        *.xz) xz -dc "$file" ;;
        *) cat "$file" ;;
      esac >"$dest/$number-$module.ko"
      strip --strip-debug "$dest/$((number++))-$module.ko"
    done < <(modprobe -d "$dir" -S "$version" --show-depends "$module" 2>/dev/null | grep '^insmod ')
  done
}

# make_cpio DIR FILE: an uncompressed initramfs; equal input gives equal bytes.
make_cpio() {
  need cpio:cpio
  find "$1" -exec touch -hd @0 {} +
  (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) >"$2"
  # A whole number of pages, so that it can be mapped.
  truncate -s %4096 "$2"
}
