use std::io::Write;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::memory;
use crate::vmm::spec::{FileSource, HostLimits, MachineSpec};

const CODE: &[u8] = b"\xb0\xfe\xe6\x64\xf4";

fn spec(memory_mib: u32) -> ValidSpec {
    let json = format!(r#"{{"kernel":{{"path":"/k"}},"cpus":1,"memory_mib":{memory_mib}}}"#);
    let spec = MachineSpec::from_json(json.as_bytes()).unwrap();
    spec.validate(HostLimits { memory: 1 << 40 }).unwrap()
}

/// An ELF file with one segment of [`CODE`] at `address`.
fn image(address: u64, memory_size: u64) -> Vec<u8> {
    let mut header = Elf64_Ehdr {
        e_machine: EM_X86_64,
        e_phnum: 1,
        e_phoff: 64,
        ..Default::default()
    };
    header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
    header.e_phentsize = size_of::<Elf64_Phdr>() as u16;
    header.e_entry = address;
    let segment = Elf64_Phdr {
        p_type: elf::PT_LOAD,
        p_offset: 120,
        p_paddr: address,
        p_filesz: CODE.len() as u64,
        p_memsz: memory_size,
        ..Default::default()
    };
    [header.as_slice(), segment.as_slice(), CODE].concat()
}

fn load_image(image: &[u8], memory_mib: u32) -> Result<LoadedKernel, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    let memory = memory::allocate(u64::from(memory_mib) << 20, false).unwrap();
    let mut kernel = Opened::for_reading(&FileSource::Path(file.path().into()), "kernel").unwrap();
    let loaded = load(&memory, &mut kernel, &spec(memory_mib)).map_err(|error| {
        let path = file.path().display().to_string();
        let error = error.to_string();
        assert!(error.contains(&path), "{error} does not name the file");
        error
    })?;
    let mut code = vec![0; CODE.len()];
    memory
        .read_slice(&mut code, GuestAddress(loaded.entry))
        .unwrap();
    assert_eq!(code, CODE);
    Ok(loaded)
}

#[test]
fn a_kernel_is_loaded_where_it_says() {
    let loaded = load_image(&image(0x100_0000, 0x3000), 32).unwrap();
    assert_eq!(
        loaded,
        LoadedKernel {
            entry: 0x100_0000,
            end: 0x100_3000
        }
    );
}

#[test]
fn a_kernel_cut_anywhere_is_refused() {
    let whole = image(0x10_0000, 5);
    for length in 0..whole.len() {
        let error = load_image(&whole[..length], 8).unwrap_err();
        assert!(error.contains("is truncated"), "{length}: {error}");
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    let mut not_elf = image(0x10_0000, 5);
    not_elf[0] = b'M';
    assert!(
        load_image(&not_elf, 8)
            .unwrap_err()
            .contains("is not an x86_64 ELF")
    );
    let mut other = image(0x10_0000, 5);
    other[18] = 0xb7;
    assert!(
        load_image(&other, 8)
            .unwrap_err()
            .contains("another architecture")
    );
    let mut big_endian = image(0x10_0000, 5);
    big_endian[5] = 2;
    assert!(
        load_image(&big_endian, 8)
            .unwrap_err()
            .contains("big-endian")
    );
    let mut entry = image(0x10_0000, 5);
    entry[24] = 0xff;
    assert!(load_image(&entry, 8).unwrap_err().contains("entry point"));
}

#[test]
fn a_kernel_must_fit() {
    for (address, size) in [
        (0x100_0000, 5),
        (0x10_0000, 1 << 40),
        (0x1000, 5),
        (u64::MAX - 2, 5),
    ] {
        let error = load_image(&image(address, size), 8).unwrap_err();
        assert!(error.contains("does not fit"), "{address:#x}: {error}");
    }
    let error = load_image(&image(1 << 30, 5), 2048).unwrap_err();
    assert!(error.contains("0x40000000"), "{error}");
}

proptest::proptest! {
    /// Headers are parsed from a file that anybody may have written.
    #[test]
    fn any_bytes_end_in_a_sentence(at in 0usize..120, bytes in proptest::collection::vec(0u8.., 1..16)) {
        let mut image = image(0x10_0000, 5);
        let end = (at + bytes.len()).min(120);
        image[at..end].copy_from_slice(&bytes[..end - at]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&image).unwrap();
        let memory = memory::allocate(8 << 20, false).unwrap();
        let mut kernel = Opened::for_reading(&FileSource::Path(file.path().into()), "kernel").unwrap();
        let _ = load(&memory, &mut kernel, &spec(8));
    }
}
