//! Output of any size and any bytes arrives complete and in order before the exit status.

use crate::fixture::{machine, say, text};

#[test]
fn stdout_and_stderr_are_apart() {
    let output = machine().shell(&[], "echo out; echo err >&2; echo more");
    assert_eq!(text(&output.stdout), "out\nmore\n");
    assert_eq!(text(&output.stderr), "err\n");
}

#[test]
fn a_quarter_of_a_gibibyte_arrives_byte_for_byte() {
    const LENGTH: usize = 256 << 20;
    let line: String = (1..=1000).map(|n| format!("{n} ")).collect();
    let output = machine().shell(&[], &format!("yes '{line}' | head -c {LENGTH}"));
    assert_eq!(output.stdout.len(), LENGTH, "{}", text(&output.stderr));
    let line = line + "\n";
    let wrong = output
        .stdout
        .chunks(line.len())
        .position(|got| got != &line.as_bytes()[..got.len()]);
    assert_eq!(wrong, None, "first wrong line");
}

#[test]
fn ten_thousand_lines_on_both_streams_are_complete_and_in_order() {
    let output = machine().shell(&[], "for i in $(seq 10000); do echo $i; echo $i >&2; done");
    let expected: String = (1..=10_000).map(|n| format!("{n}\n")).collect();
    assert!(
        text(&output.stdout) == expected,
        "{} bytes",
        output.stdout.len()
    );
    assert!(
        text(&output.stderr) == expected,
        "{} bytes",
        output.stderr.len()
    );
}

#[test]
fn every_byte_passes_through_stdin_and_back() {
    let bytes: Vec<u8> = (0..3 << 20_u32)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let machine = machine();
    let mut run = machine.start(&["-i"], "cat");
    run.feed(bytes.clone());
    let output = run.finish();
    assert!(
        output.stdout == bytes,
        "{} bytes: {}",
        output.stdout.len(),
        text(&output.stderr)
    );
}

#[test]
fn without_i_stdin_is_empty() {
    assert_eq!(say(&[], "cat; echo end"), "end\n");
}

#[test]
fn output_that_nobody_reads_any_more_ends_the_writer() {
    let machine = machine();
    let mut run = machine.start(&[], "exec yes");
    assert_eq!(run.line(), "y\n");
    run.stop_reading();
    assert!(run.finish().status.code().is_some());
}

#[test]
fn a_slow_reader_gets_everything() {
    let machine = machine();
    let mut run = machine.start(&[], "seq 200000");
    // The container has long filled every buffer on the way when the first line is read here.
    let first = run.line();
    let output = run.finish();
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(
        first + &text(&output.stdout) == expected,
        "{} bytes",
        output.stdout.len()
    );
}
