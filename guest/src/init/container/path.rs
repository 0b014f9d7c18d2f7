//! Finding the program: a shell's rules for `PATH`, and its exit statuses when there is none.
#![forbid(unsafe_code)]

use rustix::io::Errno;

/// Exit status for a program that does not exist.
pub(crate) const NOT_FOUND: u8 = 127;
/// Exit status for a program that exists and cannot be executed.
pub(crate) const NOT_EXECUTABLE: u8 = 126;

/// The files to try for `program`, in order. One with a slash is taken as it is.
pub(crate) fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.is_empty() || program.contains('/') {
        return vec![program.to_owned()];
    }
    path.split(':')
        .map(|directory| match directory {
            // POSIX: an empty entry is the working directory.
            "" => format!("./{program}"),
            _ => format!("{}/{program}", directory.trim_end_matches('/')),
        })
        .collect()
}

/// What the failed attempts at the candidates mean: exit status and sentence. `tried` has an entry for each
/// candidate; `exists` says whether a file is there.
pub(crate) fn verdict(
    program: &str,
    path: &str,
    tried: &[(String, Errno)],
    exists: impl Fn(&str) -> bool,
) -> (u8, String) {
    let found = tried
        .iter()
        .find(|(file, error)| !is_absence(*error) || exists(file));
    match found {
        Some((file, Errno::NOENT)) => (
            NOT_FOUND,
            format!(
                "cannot execute `{file}`: the interpreter that it names does not exist in the image"
            ),
        ),
        Some((file, Errno::NOEXEC)) => (
            NOT_EXECUTABLE,
            format!(
                "cannot execute `{file}`: it is neither a program for this machine nor a #! script"
            ),
        ),
        Some((file, error)) => (NOT_EXECUTABLE, format!("cannot execute `{file}`: {error}")),
        None if program.contains('/') => (
            NOT_FOUND,
            format!("the program `{program}` does not exist in the image"),
        ),
        None => (
            NOT_FOUND,
            format!("the program `{program}` is not in the container's PATH ({path})"),
        ),
    }
}

/// Whether the search goes on after `error`.
pub(crate) fn try_next(error: Errno) -> bool {
    is_absence(error) || error == Errno::ACCESS
}

fn is_absence(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::NOTDIR)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tried(attempts: &[(&str, Errno)]) -> Vec<(String, Errno)> {
        attempts
            .iter()
            .map(|(file, error)| ((*file).to_owned(), *error))
            .collect()
    }

    #[test]
    fn a_plain_name_is_looked_up() {
        assert_eq!(
            candidates("sh", "/usr/bin:/bin/::/x"),
            ["/usr/bin/sh", "/bin/sh", "./sh", "/x/sh"]
        );
        assert_eq!(candidates("sh", "/"), ["/sh"]);
    }

    #[test]
    fn a_name_with_a_slash_is_not() {
        for name in ["/bin/sh", "./sh", "a/b", ""] {
            assert_eq!(candidates(name, "/usr/bin"), [name]);
        }
    }

    #[test]
    fn nothing_there_is_127() {
        let attempts = tried(&[("/a/x", Errno::NOENT), ("/b/x", Errno::NOTDIR)]);
        let (code, reason) = verdict("x", "/a:/b", &attempts, |_| false);
        assert_eq!(
            (code, &*reason),
            (
                127,
                "the program `x` is not in the container's PATH (/a:/b)"
            )
        );
    }

    #[test]
    fn a_missing_interpreter_is_127_and_says_so() {
        let attempts = tried(&[("/a/x", Errno::NOENT)]);
        let (code, reason) = verdict("/a/x", "", &attempts, |_| true);
        assert_eq!(code, 127);
        assert!(reason.contains("interpreter"), "{reason}");
    }

    #[test]
    fn a_file_that_may_not_be_executed_is_126_wherever_it_is() {
        let attempts = tried(&[
            ("/a/x", Errno::NOENT),
            ("/b/x", Errno::ACCESS),
            ("/c/x", Errno::NOENT),
        ]);
        let (code, reason) = verdict("x", "/a:/b:/c", &attempts, |_| false);
        assert_eq!(code, 126);
        assert!(reason.contains("/b/x"), "{reason}");
    }

    proptest! {
        #[test]
        fn every_candidate_ends_in_the_program(program in "[a-z]{1,8}", path in "[a-z:/.]{0,40}") {
            for file in candidates(&program, &path) {
                prop_assert!(file.contains('/'));
                prop_assert_eq!(file.rsplit('/').next(), Some(&*program));
            }
        }
    }
}
