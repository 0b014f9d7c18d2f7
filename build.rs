//! Compiles `resources/seccomp/*.json` into BPF programs: `cube-vmm` installs them as they are.
#![forbid(unsafe_code)]

#[path = "src/vmm/seccomp/search.rs"]
mod search;

use std::error::Error;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;

use seccompiler::{TargetArch, compile_from_json};

/// A file each, with one filter of the same name in it.
const ROLES: [&str; 3] = ["worker", "vcpu", "vhost_user"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=resources/seccomp");
    println!("cargo::rerun-if-changed=src/vmm/seccomp/search.rs");
    let mut source = String::new();
    for role in ROLES {
        let path = format!("resources/seccomp/{role}.json");
        let filters = compile_from_json(File::open(&path)?, TargetArch::x86_64)
            .map_err(|error| format!("{path}: {error}"))?;
        let chain = filters.get(role).ok_or(format!("{path} has no `{role}`"))?;
        let program = search::arranged(chain).ok_or("seccompiler writes filters in another way")?;
        writeln!(source, "/// `{path}`, compiled.")?;
        writeln!(
            source,
            "pub(super) const {}: &[sock_filter] = &[",
            role.to_uppercase()
        )?;
        for step in program {
            let (code, jt, jf, k) = (step.code, step.jt, step.jf, step.k);
            writeln!(
                source,
                "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},"
            )?;
        }
        writeln!(source, "];")?;
    }
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    fs::write(Path::new(&out).join("seccomp.rs"), source)?;
    Ok(())
}
