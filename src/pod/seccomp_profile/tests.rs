//! Profiles against a reading of their rules, by an interpreter of BPF, and against the kernel.

use proptest::prelude::*;
use rustix::io::Errno;
use serde_json::{Value, json};

use super::*;

/// AUDIT_ARCH_X86_64 (linux/audit.h).
const ARCH: u32 = 0xc000_003e;

fn compiled(profile: &Value) -> Vec<Vec<u64>> {
    match compile(profile.to_string().as_bytes()).unwrap() {
        Seccomp::Programs(programs) => programs,
        other => panic!("{other:?}"),
    }
}

fn refused(profile: &Value) -> String {
    compile(profile.to_string().as_bytes())
        .unwrap_err()
        .to_string()
}

/// Runs one program over `struct seccomp_data`: the instructions that seccompiler writes.
fn run(program: &[u64], call: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [call.to_le_bytes(), ARCH.to_le_bytes()].concat();
    data.extend([0; 8]);
    data.extend(arguments.iter().flat_map(|a| a.to_le_bytes()));
    let (mut at, mut a) = (0, 0_u32);
    loop {
        let [c0, c1, jt, jf, k0, k1, k2, k3] = program[at].to_le_bytes();
        let k = u32::from_le_bytes([k0, k1, k2, k3]);
        at += 1;
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match u16::from_le_bytes([c0, c1]) {
            0x20 => a = u32::from_le_bytes(data[k as usize..][..4].try_into().unwrap()),
            0x54 => a &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(a == k),
            0x25 => at += jump(a > k),
            0x35 => at += jump(a >= k),
            0x06 => return k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

/// What the kernel makes of all programs: the smallest action, as a signed number, counts.
fn verdict(programs: &[Vec<u64>], call: u32, arguments: [u64; 6]) -> u32 {
    let answers = programs.iter().map(|p| run(p, call, arguments));
    answers.chain([ALLOW]).min_by_key(|r| rank(*r)).unwrap()
}

fn rank(answer: u32) -> i32 {
    (answer & 0xffff_0000).cast_signed()
}

const ALLOW: u32 = 0x7fff_0000;
/// Actions as profiles write them, with what the kernel returns for them.
const ACTIONS: [(&str, Option<u32>, u32); 7] = [
    ("SCMP_ACT_ALLOW", None, ALLOW),
    ("SCMP_ACT_LOG", None, 0x7ffc_0000),
    ("SCMP_ACT_TRACE", Some(7), 0x7ff0_0007),
    ("SCMP_ACT_ERRNO", Some(38), 0x0005_0026),
    ("SCMP_ACT_TRAP", None, 0x0003_0000),
    ("SCMP_ACT_KILL", None, 0),
    ("SCMP_ACT_KILL_PROCESS", None, 0x8000_0000),
];
const OPERATORS: [&str; 7] = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];

#[derive(Debug, Clone)]
struct Condition {
    index: u8,
    operator: usize,
    value: u64,
    second: u64,
}

impl Condition {
    fn holds(&self, arguments: [u64; 6]) -> bool {
        let given = arguments[usize::from(self.index)];
        match OPERATORS[self.operator] {
            "NE" => given != self.value,
            "LT" => given < self.value,
            "LE" => given <= self.value,
            "EQ" => given == self.value,
            "GE" => given >= self.value,
            "GT" => given > self.value,
            _ => given & self.value == self.second & self.value,
        }
    }
}

#[derive(Debug, Clone)]
struct Rule {
    call: Sysno,
    action: usize,
    conditions: Vec<Condition>,
}

impl Rule {
    fn matches(&self, call: Sysno, arguments: [u64; 6]) -> bool {
        let mut holds = self.conditions.iter().map(|c| c.holds(arguments));
        let mut indices: Vec<u8> = self.conditions.iter().map(|c| c.index).collect();
        indices.sort_unstable();
        let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
        call == self.call
            && if repeated {
                holds.any(|h| h)
            } else {
                holds.all(|h| h)
            }
    }

    fn json(&self) -> Value {
        let (action, data, _) = ACTIONS[self.action];
        let arguments = self.conditions.iter().map(|c| {
            json!({ "index": c.index, "value": c.value, "valueTwo": c.second,
                    "op": format!("SCMP_CMP_{}", OPERATORS[c.operator]) })
        });
        json!({ "names": [self.call.name(), "a_call_of_2040"], "action": action,
                "errnoRet": data, "args": arguments.collect::<Vec<_>>() })
    }
}

/// Values around the edges of both halves of an argument.
fn argument() -> impl Strategy<Value = u64> {
    let edges = [0, 1, 2, 0xffff_ffff, 1 << 32, (1 << 32) + 1, u64::MAX];
    prop_oneof![prop::sample::select(edges.to_vec()), any::<u64>()]
}

fn call() -> impl Strategy<Value = Sysno> {
    prop::sample::select(vec![Sysno::read, Sysno::clone, Sysno::clone3])
}

fn rule() -> impl Strategy<Value = Rule> {
    let condition = (0..6_u8, 0..OPERATORS.len(), argument(), argument()).prop_map(
        |(index, operator, value, second)| Condition {
            index,
            operator,
            value,
            second,
        },
    );
    let conditions = prop::collection::vec(condition, 0..3);
    (call(), 0..ACTIONS.len(), conditions).prop_map(|(call, action, conditions)| Rule {
        call,
        action,
        conditions,
    })
}

proptest! {
    #[test]
    fn the_programs_do_what_the_rules_say(
        default in 0..ACTIONS.len(),
        rules in prop::collection::vec(rule(), 0..8),
        calls in prop::collection::vec((call(), prop::array::uniform6(argument())), 1..20),
    ) {
        let (name, data, default_answer) = ACTIONS[default];
        let syscalls: Vec<Value> = rules.iter().map(Rule::json).collect();
        let programs = compiled(&json!({
            "defaultAction": name, "defaultErrnoRet": data, "syscalls": syscalls,
        }));
        for (call, arguments) in calls {
            let matching = rules.iter()
                .filter(|rule| rule.action != default && rule.matches(call, arguments))
                .map(|rule| ACTIONS[rule.action].2);
            let expected = matching.min_by_key(|a| rank(*a)).unwrap_or(default_answer);
            let given = verdict(&programs, call.id().cast_unsigned(), arguments);
            prop_assert_eq!(given, expected, "{:?} {:?}", call, arguments);
        }
    }

    #[test]
    fn any_bytes_are_a_profile_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = compile(&bytes);
    }
}

/// Installs the programs in a thread, which they limit alone, as the guest does.
fn under(profile: &Value, check: impl FnOnce() + Send + 'static) {
    let programs = compiled(profile);
    let limited = std::thread::spawn(move || {
        for program in programs {
            let program: BpfProgram = program.into_iter().map(instruction).collect();
            seccompiler::apply_filter(&program).unwrap();
        }
        check();
    });
    limited.join().unwrap();
}

fn instruction(word: u64) -> sock_filter {
    let [c0, c1, jt, jf, k0, k1, k2, k3] = word.to_le_bytes();
    sock_filter {
        code: u16::from_le_bytes([c0, c1]),
        jt,
        jf,
        k: u32::from_le_bytes([k0, k1, k2, k3]),
    }
}

#[test]
fn the_kernel_takes_the_most_restrictive_of_several_actions() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
              "args": [{ "index": 1, "value": 31, "op": "SCMP_CMP_EQ" }] },
            { "names": ["sethostname", "personality"], "action": "SCMP_ACT_ERRNO" },
        ],
    });
    under(&profile, || {
        use rustix::process::{getpid, test_kill_process};
        assert_eq!(rustix::system::sethostname(b"x").unwrap_err(), Errno::PERM);
        // Signal 0 is not signal 31.
        assert!(test_kill_process(getpid()).is_ok());
        let signal = rustix::process::Signal::from_named_raw(31).unwrap();
        let refused = rustix::process::kill_process(getpid(), signal);
        assert_eq!(refused.unwrap_err(), Errno::NOSYS);
    });
}

#[test]
fn a_list_of_what_is_allowed_leaves_the_rest_to_the_default() {
    let others: Vec<&str> = Sysno::iter()
        .map(|call| call.name())
        .filter(|name| !["sethostname", "clone3"].contains(name))
        .collect();
    let programs = compiled(&json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "syscalls": [
            { "names": others, "action": "SCMP_ACT_ALLOW" },
            { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
        ],
    }));
    assert_eq!(programs.len(), 2);
    let answer = |call: Sysno| verdict(&programs, call.id().cast_unsigned(), [0; 6]);
    assert_eq!(answer(Sysno::read), ALLOW);
    assert_eq!(answer(Sysno::sethostname), 0x0005_0001);
    assert_eq!(answer(Sysno::clone3), 0x0005_0026);
}

#[test]
fn faults_name_their_field() {
    let rule = |key: &str, value: Value| {
        let mut rule = json!({ "names": ["read"], "action": "SCMP_ACT_ALLOW" });
        rule[key] = value;
        json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule] })
    };
    let head = |key: &str, value: Value| {
        let mut head = json!({ "defaultAction": "SCMP_ACT_ERRNO" });
        head[key] = value;
        head
    };
    let argument = |index: u8, op: &str| json!([{ "index": index, "value": 0, "op": op }]);
    let cases = [
        (
            head("defaultAction", json!("SCMP_ACT_X")),
            "`defaultAction`",
        ),
        (
            head("defaultErrnoRet", json!(4096)),
            "`defaultErrnoRet` is 4096",
        ),
        (
            head("architectures", json!(["SCMP_ARCH_ARM"])),
            "`architectures`",
        ),
        (
            head("flags", json!(["SECCOMP_FILTER_FLAG_LOG"])),
            "`flags[0]`",
        ),
        (head("listenerPath", json!("/s")), "`listenerPath`"),
        (head("listenerMetadata", json!("m")), "`listenerMetadata`"),
        // What Docker's own format has: its conditions must not be passed over.
        (head("archMap", json!([])), "unknown field `archMap`"),
        (rule("excludes", json!({})), "unknown field `excludes`"),
        (rule("names", json!([])), "`syscalls[0].names`"),
        (
            rule("action", json!("SCMP_ACT_NOTIFY")),
            "`syscalls[0].action`",
        ),
        (rule("errnoRet", json!(1)), "`syscalls[0].errnoRet`"),
        (
            rule("args", argument(6, "SCMP_CMP_EQ")),
            "`syscalls[0].args[0].index`",
        ),
        (rule("args", argument(0, "==")), "`syscalls[0].args[0].op`"),
    ];
    for (profile, expected) in cases {
        let sentence = refused(&profile);
        assert!(sentence.contains(expected), "{sentence}");
    }
}

#[test]
fn a_profile_longer_than_the_kernel_takes_is_an_error() {
    let argument = |value| json!({ "index": 0, "value": value, "op": "SCMP_CMP_EQ" });
    let arguments: Vec<Value> = (0..1000).map(argument).collect();
    let sentence = refused(&json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW", "args": arguments }],
    }));
    assert!(sentence.contains("fewer rules"), "{sentence}");
}
