//! Rearranges a filter so that a system call's rules are found by halving, not one after the other.
//!
//! ```text
//! seccompiler:   arch?  number  =0? rules  =1? rules  =3? rules …  default
//! here:          arch?  number  ≥14? ┬ ≥3? ┬ =0? rules, or default
//!                                    │     └ =3? rules, or default
//!                                    └ …
//! ```
//! The kernel runs a new filter for each of its 460 system calls, to note those that it lets through whatever their
//! arguments are: most of what `seccomp(2)` costs a starting thread. And it runs it for each call whose arguments count.
//!
//! `build.rs` uses this file too.
#![forbid(unsafe_code)]

use seccompiler::sock_filter;

/// Opcodes (linux/bpf_common.h): `JMP | JA`, `JMP | JEQ | K`, `JMP | JGE | K`, `RET | K`, `LD | W | ABS`.
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;
const LOAD: u16 = 0x20;

/// What comes before the first system call: load the architecture, compare, refuse, load the number.
const HEAD: [u16; 4] = [LOAD, JEQ, RET, LOAD];

/// A system call's number and what is done with it; no path leads out of its instructions.
struct Call<'a> {
    number: u32,
    rules: &'a [sock_filter],
}

/// The same filter, arranged for search; none if `chain` is not what seccompiler writes.
pub(crate) fn arranged(chain: &[sock_filter]) -> Option<Vec<sock_filter>> {
    let (head, rest) = chain.split_at_checked(HEAD.len())?;
    let (default, mut rest) = rest.split_last()?;
    if !head.iter().map(|step| step.code).eq(HEAD) || default.code != RET {
        return None;
    }
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let (call, others) = first(rest)?;
        calls.push(call);
        rest = others;
    }
    if !calls.is_sorted_by(|a, b| a.number < b.number) {
        return None;
    }
    let mut program = head.to_vec();
    find(&calls, default, &mut program);
    Some(program)
}

/// Splits the first system call off: `if number == N goto rules; goto others; rules`, in two jumps. Where there are
/// several rules, the way to the others leads over a jump before each further one.
fn first(chain: &[sock_filter]) -> Option<(Call<'_>, &[sock_filter])> {
    let (is_it, to_rules) = (chain.first()?, chain.get(1)?);
    let shape = [is_it, to_rules].map(|step| (step.code, step.jt, step.jf, step.k));
    if shape != [(JEQ, 0, 1, is_it.k), (JA, 0, 0, 1)] {
        return None;
    }
    let mut end = 2;
    while let Some(step) = chain.get(end).filter(|step| step.code == JA) {
        end += 1 + step.k as usize;
    }
    let (all, others) = chain.split_at_checked(end)?;
    let rules = all.get(3..)?;
    let call = Call {
        number: is_it.k,
        rules,
    };
    (rules.last()?.code == RET).then_some((call, others))
}

/// Appends what finds the number among `calls` and goes on with its rules, or else does `default`.
fn find(calls: &[Call<'_>], default: &sock_filter, program: &mut Vec<sock_filter>) {
    match calls {
        [] => program.push(default.clone()),
        [only] => {
            program.push(step(JEQ, 1, 0, only.number));
            program.push(default.clone());
            program.extend_from_slice(only.rules);
        }
        _ => {
            let (low, high) = calls.split_at(calls.len() / 2);
            let from = high.first().map_or(0, |call| call.number);
            let mut below = Vec::new();
            find(low, default, &mut below);
            program.push(step(JGE, 0, 1, from));
            // A filter has at most 4096 instructions.
            program.push(step(JA, 0, 0, below.len() as u32));
            program.append(&mut below);
            find(high, default, program);
        }
    }
}

fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

    use super::*;

    /// `AUDIT_ARCH_X86_64` (linux/audit.h).
    const ARCH: u32 = 0xc000_003e;

    fn chain(calls: impl Iterator<Item = i64>) -> BpfProgram {
        let rules: BTreeMap<_, _> = calls.map(|call| (call, Vec::new())).collect();
        let (others, matched) = (SeccompAction::Trap, SeccompAction::Allow);
        let filter = SeccompFilter::new(rules, others, matched, TargetArch::x86_64);
        filter.unwrap().try_into().unwrap()
    }

    /// The answer for a system call, and after how many instructions.
    fn run(program: &[sock_filter], number: u32) -> (u32, usize) {
        let (mut at, mut value) = (0, 0);
        for steps in 1.. {
            let sock_filter { code, jt, jf, k } = program[at];
            let jump = |holds: bool| usize::from(if holds { jt } else { jf });
            at += 1 + match code {
                LOAD => {
                    value = if k == 4 { ARCH } else { number };
                    0
                }
                JA => k as usize,
                JEQ => jump(value == k),
                JGE => jump(value >= k),
                RET => return (k, steps),
                other => panic!("instruction {other:#x}"),
            };
        }
        unreachable!("a filter ends")
    }

    #[test]
    fn each_answer_is_the_same_and_soon_there() {
        for count in [1, 2, 31, 300] {
            let chain = chain((0..count).map(|call| 3 * call / 2));
            let found = arranged(&chain).unwrap();
            for number in (0..500).chain([u32::MAX]) {
                let ((was, _), (is, steps)) = (run(&chain, number), run(&found, number));
                assert_eq!(was, is, "{number} of {count}");
                // 300 calls are halved nine times, with two instructions each.
                assert!(steps <= 4 + 2 * 9 + 2, "{steps} for {number} of {count}");
            }
        }
    }

    #[test]
    fn another_program_is_left_alone() {
        let mut chain = chain([1, 5].into_iter());
        assert!(arranged(&chain[1..]).is_none());
        assert!(arranged(&chain[..chain.len() - 1]).is_none());
        chain.swap(4, 9);
        assert!(arranged(&chain).is_none());
        assert!(arranged(&[]).is_none());
    }
}
