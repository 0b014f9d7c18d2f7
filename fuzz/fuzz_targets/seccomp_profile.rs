//! OCI seccomp profiles: programs that the kernel takes for their length, or an error that is a sentence.
#![no_main]

use cube::pod::seccomp_profile::compile;
use cube_guest::Seccomp;
use libfuzzer_sys::fuzz_target;

/// BPF_MAXINSNS (linux/bpf_common.h).
const MAX_INSTRUCTIONS: usize = 4096;

fuzz_target!(|input: &[u8]| match compile(input) {
    Ok(Seccomp::Programs(programs)) => {
        for program in programs {
            assert!((1..=MAX_INSTRUCTIONS).contains(&program.len()));
        }
    }
    Ok(other) => panic!("a profile became {other:?}"),
    Err(error) => assert!(error.to_string().starts_with("the seccomp profile")),
});
