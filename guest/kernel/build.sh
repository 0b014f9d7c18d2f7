#!/bin/bash
# Builds the guest kernel: build.sh SOURCE.tar.xz FRAGMENT.config DIRECTORY [JOBS]
#
# DIRECTORY must exist; it receives `vmlinux` (stripped ELF), `config` (the whole configuration) and `size` (sections).
# The tree is unpacked into DIRECTORY/source and removed at the end. Standard output is make's, one line per object.
# `cargo xtask kernel` calls this and caches the result; it runs alone as well.
set -euo pipefail

tarball=$(realpath "$1")
fragment=$(realpath "$2")
directory=$(realpath "$3")
jobs=${4:-$(nproc)}
here=$(dirname "$(realpath "$0")")

# The same source gives the same bytes.
export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=cube KBUILD_BUILD_HOST=cube
export KBUILD_BUILD_VERSION=1 LC_ALL=C ARCH=x86_64
unset MAKEFLAGS MFLAGS

mkdir "$directory/source"
cd "$directory/source"
# Kconfig files and makefiles of everything are needed, sources of other machines' drivers and documents are not.
tar -x --strip-components=1 -f "$tarball" --exclude='*/Documentation/*/*' --exclude='*/drivers/gpu/drm/*/*.[ch]' \
    --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]' --exclude='*/sound/*.[ch]' \
    --exclude='*/drivers/media/*.[ch]' --exclude='*/drivers/staging/*.[ch]' --exclude='*/tools/testing/*' \
    --exclude='*/arch/[!x]*/*.[chS]' --exclude='*/arch/[!x]*/*.dts*'
for patch in "$here"/patches/*.patch; do
    patch --quiet -p1 < "$patch"
done

KCONFIG_ALLCONFIG=$fragment make -s allnoconfig
# Kconfig drops a line whose dependencies do not hold without a word.
lost=$(grep '^CONFIG_' "$fragment" | grep -vxFf .config || true)
if [ -n "$lost" ]; then
    echo "$fragment: these lines do not hold in the resulting configuration (a dependency is missing):" >&2
    echo "$lost" >&2
    exit 1
fi

make -j"$jobs" vmlinux
objcopy --strip-all vmlinux "$directory/vmlinux"
size -A vmlinux > "$directory/size"
cp .config "$directory/config"
cd "$directory"
rm -rf source
