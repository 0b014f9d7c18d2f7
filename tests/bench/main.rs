//! The benchmark harness against fake VMMs whose delay and memory are known.
#![forbid(unsafe_code)]

mod fake;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cube::bench::density::{self, Sizes};
use cube::bench::peers::{Kind, Machine};
use cube::bench::plan::{Contender, Rounds, Row, run};

const ROUNDS: Rounds = Rounds {
    warm_up: 0,
    counted: 2,
    deadline: Duration::from_secs(120),
};

fn row(directory: &Path, mode: &str) -> Row {
    let vmm = fake::script(directory, mode);
    row_of(directory, mode, Kind::Firecracker, vmm)
}

fn row_of(directory: &Path, name: &str, kind: Kind, vmm: PathBuf) -> Row {
    let peer = kind.at(vmm).expect("it says its version");
    let machine = Machine {
        name: "fake".to_owned(),
        kernel: directory.join("none"),
        init: None,
        disk: None,
        vsock: false,
        command_line: String::new(),
        cpus: 1,
        memory_mib: fake::MEMORY_MIB,
    };
    let contender = Contender::Vmm {
        peer,
        tiny: Some(machine.clone()),
        linux: Some(machine),
        disk: None,
    };
    Row::new(name.to_owned(), contender)
}

fn measured(directory: &Path, modes: &[&str]) -> Vec<Row> {
    let mut rows: Vec<Row> = modes.iter().map(|mode| row(directory, mode)).collect();
    run(&mut rows, ROUNDS, directory, &mut || ()).expect("the harness runs");
    rows
}

fn within_five_percent(measured: f64, known: f64) {
    assert!(
        (measured / known - 1.0).abs() < 0.05,
        "measured {measured}, known {known}"
    );
}

#[test]
fn a_known_delay_is_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let rows = measured(directory.path(), &["slow"]);
    // The fake notes when it really wrote its marker: a busy machine delays both clocks.
    let real = fs::read_to_string(directory.path().join("delays")).expect("its notes");
    let real: Vec<f64> = real
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    let samples: Vec<f64> = ["vmm_start_ms", "boot_to_init_ms"]
        .iter()
        .flat_map(|f| rows[0].figures[*f].clone())
        .collect();
    assert_eq!((samples.len(), rows[0].failure.as_deref()), (4, None));
    for sample in samples {
        let real = real
            .iter()
            .copied()
            .min_by(|a, b| (a - sample).abs().total_cmp(&(b - sample).abs()));
        within_five_percent(sample, real.expect("four notes"));
        assert!(sample >= fake::DELAY_MS as f64);
    }
}

#[test]
fn a_disk_of_known_slowness_is_measured_and_a_guest_without_one_has_no_figure() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut rows: Vec<Row> = ["reads", "lacks"]
        .iter()
        .map(|mode| row(directory.path(), mode))
        .collect();
    for row in &mut rows {
        let Contender::Vmm { linux, disk, .. } = &mut row.contender else {
            panic!("a VMM");
        };
        *disk = linux.take();
    }
    run(&mut rows, ROUNDS, directory.path(), &mut || ()).expect("the harness runs");
    // The runs for the VMM's start are ended before they have read anything.
    let real = fs::read_to_string(directory.path().join("delays")).expect("its notes");
    let real: Vec<f64> = real
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    let measured = &rows[0].figures["disk_read_ms"];
    assert_eq!((real.len(), measured.len()), (2, 2));
    for (measured, real) in measured.iter().zip(real) {
        within_five_percent(*measured, real);
    }
    assert_eq!(rows[1].failure, None);
    assert!(!rows[1].figures.contains_key("disk_read_ms"));
}

#[test]
fn known_memory_is_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let rows = measured(directory.path(), &["small", "large"]);
    let median = |row: &Row, figure: &str| {
        row.summary(figure)
            .unwrap_or_else(|| panic!("{figure}: {row:?}"))
            .median
    };
    for row in &rows {
        within_five_percent(
            median(row, "guest_touched_mib"),
            f64::from(fake::TOUCHED_MIB),
        );
        assert!(median(row, "threads") >= 1.0);
    }
    // The fake is a program of its own size: what is known is the difference.
    for figure in ["overhead_pss_mib", "overhead_rss_mib"] {
        within_five_percent(
            median(&rows[1], figure) - median(&rows[0], figure),
            f64::from(fake::BALLAST_MIB),
        );
    }
}

#[test]
fn one_that_crashes_or_hangs_is_a_row_that_says_so_and_the_others_are_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut rows: Vec<Row> = ["crashes", "hangs", "small"]
        .iter()
        .map(|mode| row(directory.path(), mode))
        .collect();
    rows.push(Row::missing("crosvm"));
    let rounds = Rounds {
        deadline: Duration::from_secs(10),
        ..ROUNDS
    };
    run(&mut rows, rounds, directory.path(), &mut || ()).expect("the harness runs");
    let failures: Vec<&str> = rows
        .iter()
        .map(|row| row.failure.as_deref().unwrap_or_default())
        .collect();
    assert!(
        failures[0].contains("exit status: 3") && failures[0].contains("no such kernel"),
        "{failures:?}"
    );
    assert!(
        failures[1].contains("did not run within 10.0 s"),
        "{failures:?}"
    );
    assert_eq!(
        (failures[2], rows[2].figures["vmm_start_ms"].len()),
        ("", 2)
    );
    assert!(failures[3].contains("not found"), "{failures:?}");
}

#[test]
fn a_crosvm_is_told_to_leave_out_what_its_build_knows_and_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    for known in [
        &["--no-balloon", "--no-rng", "--no-usb"][..],
        &["--no-rng", "--no-usb"],
    ] {
        let vmm = fake::crosvm(directory.path(), known);
        let mut rows = [row_of(directory.path(), "crosvm", Kind::Crosvm, vmm)];
        let Contender::Vmm { peer, tiny, .. } = &rows[0].contender else {
            panic!("a VMM");
        };
        let machine = tiny.as_ref().expect("a machine");
        let command = peer.command(machine, directory.path()).expect("a command");
        let mut left_out: Vec<_> = command.get_args().collect();
        left_out.retain(|word| word.to_string_lossy().starts_with("--no-"));
        assert_eq!(left_out, known);
        run(&mut rows, ROUNDS, directory.path(), &mut || ()).expect("the harness runs");
        assert_eq!(rows[0].failure, None);
        assert_eq!(rows[0].figures["vmm_start_ms"].len(), 2);
    }
}

#[test]
fn a_crowd_of_fakes_is_started_filled_and_stopped() {
    let directory = tempfile::tempdir().expect("a directory");
    let sizes = Sizes {
        at_once: vec![1, 3],
        limit_mib: None,
        deadline: ROUNDS.deadline,
    };
    let crowd = density::measure(&row(directory.path(), "small"), &sizes, directory.path());
    let crowd = crowd.expect("the harness runs").expect("it idles");
    assert_eq!(crowd.failure, None);
    let counts: Vec<usize> = crowd
        .batches
        .iter()
        .map(|batch| batch.ready_ms.len())
        .collect();
    assert_eq!(counts, [1, 3]);
}
