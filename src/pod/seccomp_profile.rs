//! An OCI seccomp profile (runtime-spec 1.2, config-linux.md, "Seccomp") as classic BPF programs for
//! the guest, which has no compiler: what comes out is [`Seccomp::Programs`].
//!
//! A program has one action for the calls that it matches and one for all others, so a profile becomes
//! several. The kernel runs all of them and takes the most restrictive answer (seccomp(2)):
//!
//! ```text
//!  first program            calls of any rule → allow    others → the profile's default action
//!  one per further action   calls of its rules → it      others → allow
//! ```
//!
//! Where the conditions of two rules overlap, the more restrictive of their actions therefore counts.
//!
//! As in runc, names that x86_64 does not have are passed over, because profiles list those of every
//! architecture and of kernels to come; so is a rule whose action is the default one, and several
//! conditions on one argument are alternatives. What cannot be kept in a guest is refused by its field:
//! there is nobody to notify, and no flag travels with a program.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use cube_guest::Seccomp;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};
use serde::Deserialize;
use syscalls::x86_64::Sysno;

use crate::vmm::seccomp::search;

/// `errnoRet` where the profile has none.
const EPERM: u32 = 1;
/// The kernel's MAX_ERRNO: the largest that a system call can fail with.
const MAX_ERRNO: u32 = 4095;
/// SECCOMP_RET_DATA: the data of an action.
const MAX_DATA: u32 = 0xffff;
/// The longest program that the kernel takes (BPF_MAXINSNS, linux/bpf_common.h).
const MAX_LENGTH: usize = 4096;
/// Arguments of a system call (`struct seccomp_data`).
const ARGUMENTS: u8 = 6;

/// Why a profile cannot be used: a sentence that names the field.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It is not the JSON of a profile, or has a field that the runtime specification does not.
    #[error("the seccomp profile is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A field's value cannot be used.
    #[error("the seccomp profile's field `{field}` {fault}")]
    Field {
        /// Path of the field, such as `syscalls[3].args[0].op`.
        field: String,
        /// What is wrong with it, as the rest of a sentence.
        fault: String,
    },
    /// A program would be longer than the kernel takes (BPF_MAXINSNS).
    #[error("the seccomp profile cannot be compiled: {0}; give it fewer rules")]
    Compile(#[from] BackendError),
}

fn fault<T>(field: impl Into<String>, fault: impl Into<String>) -> Result<T, ProfileError> {
    Err(ProfileError::Field {
        field: field.into(),
        fault: fault.into(),
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    flags: Vec<String>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Vec<Entries>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entries {
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Vec<Argument>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Argument {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// Calls by number, with the alternatives under which they match; none: always.
type Calls = BTreeMap<i64, Vec<SeccompRule>>;

/// Compiles the JSON of a profile.
///
/// # Errors
/// [`ProfileError`]: the field that is wrong, or cannot be kept in a guest.
pub fn compile(json: &[u8]) -> Result<Seccomp, ProfileError> {
    let profile: Profile = serde_json::from_slice(json)?;
    check_head(&profile)?;
    let default = action(
        &profile.default_action,
        profile.default_errno_ret,
        ["defaultAction", "defaultErrnoRet"].map(str::to_owned),
    )?;
    let mut ruled = Calls::new();
    let mut by_action: Vec<(SeccompAction, Calls)> = Vec::new();
    for (number, entries) in profile.syscalls.iter().enumerate() {
        let field = |name: &str| format!("syscalls[{number}].{name}");
        if entries.names.is_empty() {
            return fault(field("names"), "is empty; a rule needs a system call");
        }
        let fields = [field("action"), field("errnoRet")];
        let action = action(&entries.action, entries.errno_ret, fields)?;
        let alternatives = alternatives(&entries.args, &field("args"))?;
        if action == default {
            continue;
        }
        let calls = match by_action.iter().position(|(known, _)| *known == action) {
            Some(at) => by_action.get_mut(at),
            None => {
                by_action.push((action, Calls::new()));
                by_action.last_mut()
            }
        };
        let Some((_, calls)) = calls else { continue };
        for name in entries.names.iter().filter_map(|name| name.parse().ok()) {
            let call = i64::from(Sysno::id(&name));
            add(&mut ruled, call, &alternatives);
            add(calls, call, &alternatives);
        }
    }
    programs(default, ruled, by_action)
}

fn programs(
    default: SeccompAction,
    ruled: Calls,
    by_action: Vec<(SeccompAction, Calls)>,
) -> Result<Seccomp, ProfileError> {
    let allow = SeccompAction::Allow;
    let mut programs = Vec::new();
    if default != allow {
        programs.push(program(ruled, default, allow.clone())?);
    }
    for (action, calls) in by_action {
        if action != allow && !calls.is_empty() {
            programs.push(program(calls, allow.clone(), action)?);
        }
    }
    Ok(Seccomp::Programs(programs))
}

fn program(
    calls: Calls,
    others: SeccompAction,
    matched: SeccompAction,
) -> Result<Vec<u64>, ProfileError> {
    let filter = SeccompFilter::new(calls, others, matched, TargetArch::x86_64)?;
    let chain: BpfProgram = filter.try_into()?;
    let found = search::arranged(&chain).filter(|program| program.len() <= MAX_LENGTH);
    Ok(found.unwrap_or(chain).iter().map(word).collect())
}

/// `struct sock_filter` (linux/filter.h) as a little-endian word.
fn word(instruction: &sock_filter) -> u64 {
    let [c0, c1] = instruction.code.to_le_bytes();
    let [k0, k1, k2, k3] = instruction.k.to_le_bytes();
    u64::from_le_bytes([c0, c1, instruction.jt, instruction.jf, k0, k1, k2, k3])
}

fn add(calls: &mut Calls, call: i64, alternatives: &[SeccompRule]) {
    match calls.entry(call) {
        Entry::Vacant(entry) => drop(entry.insert(alternatives.to_vec())),
        // It matches always: nothing can be added to that.
        Entry::Occupied(entry) if entry.get().is_empty() => {}
        Entry::Occupied(mut entry) if alternatives.is_empty() => entry.get_mut().clear(),
        Entry::Occupied(mut entry) => entry.get_mut().extend_from_slice(alternatives),
    }
}

/// What the profile says besides its rules.
fn check_head(profile: &Profile) -> Result<(), ProfileError> {
    let native = |name: &String| name == "SCMP_ARCH_X86_64";
    // Others may be there as well: the guest's kernel runs programs of no other.
    if !profile.architectures.is_empty() && !profile.architectures.iter().any(native) {
        return fault("architectures", "lacks SCMP_ARCH_X86_64, which pods run on");
    }
    for (number, flag) in profile.flags.iter().enumerate() {
        match flag.as_str() {
            // The filter is installed in the container's only thread, and the guest's kernel leaves
            // the mitigations that the second one would turn off.
            "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => {}
            other => {
                let text = format!("is {other:?}, which cannot be had in a pod: leave it out");
                return fault(format!("flags[{number}]"), text);
            }
        }
    }
    let listener = [
        ("listenerPath", &profile.listener_path),
        ("listenerMetadata", &profile.listener_metadata),
    ];
    match listener.iter().find(|(_, value)| value.is_some()) {
        Some((field, _)) => fault(
            *field,
            "is set, but a pod has nobody to notify: leave it out",
        ),
        None => Ok(()),
    }
}

/// The action of a name and an `errnoRet`, whose fields are `fields`.
fn action(
    name: &str,
    data: Option<u32>,
    fields: [String; 2],
) -> Result<SeccompAction, ProfileError> {
    let [field, data_field] = fields;
    let (action, most) = match name {
        "SCMP_ACT_ALLOW" => (SeccompAction::Allow, 0),
        "SCMP_ACT_ERRNO" => (SeccompAction::Errno(data.unwrap_or(EPERM)), MAX_ERRNO),
        "SCMP_ACT_TRACE" => (SeccompAction::Trace(data.unwrap_or(EPERM)), MAX_DATA),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => (SeccompAction::KillThread, 0),
        "SCMP_ACT_KILL_PROCESS" => (SeccompAction::KillProcess, 0),
        "SCMP_ACT_TRAP" => (SeccompAction::Trap, 0),
        "SCMP_ACT_LOG" => (SeccompAction::Log, 0),
        "SCMP_ACT_NOTIFY" => {
            return fault(field, "is SCMP_ACT_NOTIFY, but a pod has nobody to notify");
        }
        other => return fault(field, format!("is {other:?}, which is no action")),
    };
    match data {
        Some(_) if most == 0 => fault(data_field, format!("is set, but {name} takes none")),
        Some(given) if given > most => {
            fault(data_field, format!("is {given}; it can be {most} at most"))
        }
        _ => Ok(action),
    }
}

/// The conditions of a rule, which all must hold; several on one argument are alternatives instead.
fn alternatives(arguments: &[Argument], field: &str) -> Result<Vec<SeccompRule>, ProfileError> {
    let mut conditions = Vec::new();
    let mut seen = 0_u8;
    let mut repeated = false;
    for (number, argument) in arguments.iter().enumerate() {
        conditions.push(condition(argument, &format!("{field}[{number}]"))?);
        let bit = 1_u8.checked_shl(argument.index.into()).unwrap_or(0);
        repeated |= seen & bit != 0;
        seen |= bit;
    }
    let rules = match (conditions.is_empty(), repeated) {
        (true, _) => Vec::new(),
        (false, false) => vec![conditions],
        (false, true) => conditions.into_iter().map(|one| vec![one]).collect(),
    };
    let rules: Result<_, BackendError> = rules.into_iter().map(SeccompRule::new).collect();
    Ok(rules?)
}

fn condition(argument: &Argument, field: &str) -> Result<SeccompCondition, ProfileError> {
    if argument.index >= ARGUMENTS {
        let text = format!("is {}; a system call has arguments 0 to 5", argument.index);
        return fault(format!("{field}.index"), text);
    }
    let (operator, value) = match argument.op.as_str() {
        "SCMP_CMP_NE" => (SeccompCmpOp::Ne, argument.value),
        "SCMP_CMP_LT" => (SeccompCmpOp::Lt, argument.value),
        "SCMP_CMP_LE" => (SeccompCmpOp::Le, argument.value),
        "SCMP_CMP_EQ" => (SeccompCmpOp::Eq, argument.value),
        "SCMP_CMP_GE" => (SeccompCmpOp::Ge, argument.value),
        "SCMP_CMP_GT" => (SeccompCmpOp::Gt, argument.value),
        "SCMP_CMP_MASKED_EQ" => (SeccompCmpOp::MaskedEq(argument.value), argument.value_two),
        other => {
            let text = format!("is {other:?}, which is no comparison");
            return fault(format!("{field}.op"), text);
        }
    };
    let condition =
        SeccompCondition::new(argument.index, SeccompCmpArgLen::Qword, operator, value)?;
    Ok(condition)
}

#[cfg(test)]
mod tests;
