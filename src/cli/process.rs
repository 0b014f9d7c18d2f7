//! What runs in the container: the image's configuration under the command line's options, by Docker's
//! rules.
//!
//! - Arguments after the image replace the image's command and follow its entrypoint.
//! - `--entrypoint` replaces the entrypoint and drops the image's command.
//! - `--env` overrides the image's environment by name; a name alone takes this process's value.
#![forbid(unsafe_code)]

use cube_guest::ProcessSpec;

/// What an image says about the process that it is made for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ImageProcess {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) workdir: String,
    pub(crate) user: String,
}

/// What the command line says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ProcessOptions {
    pub(crate) entrypoint: Option<String>,
    pub(crate) arguments: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) workdir: Option<String>,
    pub(crate) user: Option<String>,
}

/// Options that make no process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProcessError {
    /// Neither the image nor the command line has one.
    #[error("the image {0} names no command: give one after `--`")]
    NoCommand(String),
    /// `=value`, or nothing.
    #[error(
        "`--env {0}` has no name: write NAME=value, or NAME to pass this environment's value on"
    )]
    NoName(String),
    /// Linux knows no such string.
    #[error("{0} contains a NUL byte")]
    Nul(&'static str),
    /// A relative directory means nothing.
    #[error("`--workdir {0}` is not an absolute path")]
    RelativeWorkdir(String),
}

/// The process; its standard streams are the caller's to set.
pub(crate) fn process(
    image_name: &str,
    image: ImageProcess,
    options: ProcessOptions,
    value_of: impl Fn(&str) -> Option<String>,
) -> Result<ProcessSpec, ProcessError> {
    let (mut argv, command) = match options.entrypoint {
        // As with Docker, an empty one means none.
        Some(entrypoint) if entrypoint.is_empty() => (Vec::new(), Vec::new()),
        Some(entrypoint) => (vec![entrypoint], Vec::new()),
        None => (image.entrypoint, image.command),
    };
    argv.extend(if options.arguments.is_empty() {
        command
    } else {
        options.arguments
    });
    if argv.is_empty() {
        return Err(ProcessError::NoCommand(image_name.to_owned()));
    }
    let cwd = match options.workdir {
        Some(workdir) if !workdir.starts_with('/') => {
            return Err(ProcessError::RelativeWorkdir(workdir));
        }
        Some(workdir) => workdir,
        None => image.workdir,
    };
    let process = ProcessSpec {
        argv,
        env: environment(image.env, options.env, value_of)?,
        cwd,
        user: options.user.unwrap_or(image.user),
        ..ProcessSpec::default()
    };
    check_nul(&process)?;
    Ok(process)
}

fn environment(
    image: Vec<String>,
    options: Vec<String>,
    value_of: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, ProcessError> {
    let mut environment = image;
    for option in options {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (option.as_str(), value_of(&option)),
        };
        if name.is_empty() {
            return Err(ProcessError::NoName(option));
        }
        environment.retain(|entry| entry.split('=').next() != Some(name));
        environment.extend(value.map(|value| format!("{name}={value}")));
    }
    Ok(environment)
}

fn check_nul(process: &ProcessSpec) -> Result<(), ProcessError> {
    let parts = [
        ("the command", process.argv.as_slice()),
        ("the environment", &process.env),
        ("the working directory", std::slice::from_ref(&process.cwd)),
        ("the user", std::slice::from_ref(&process.user)),
    ];
    match parts
        .into_iter()
        .find(|(_, texts)| texts.iter().any(|text| text.contains('\0')))
    {
        Some((part, _)) => Err(ProcessError::Nul(part)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn made(image: &ImageProcess, options: &ProcessOptions) -> Result<ProcessSpec, ProcessError> {
        let value_of = |name: &str| (name == "FROM_HERE").then(|| "here".to_owned());
        process("img", image.clone(), options.clone(), value_of)
    }

    #[test]
    fn entrypoint_and_command_combine_as_with_docker() {
        // entrypoint, command of the image; --entrypoint, arguments; what runs.
        let cases = [
            ("", "sh -i", None, "", "sh -i"),
            ("", "sh -i", None, "ls /", "ls /"),
            ("tini --", "sh", None, "", "tini -- sh"),
            ("tini --", "sh", None, "ls /", "tini -- ls /"),
            ("tini --", "sh", Some("env"), "", "env"),
            ("tini --", "sh", Some("env"), "-i ls", "env -i ls"),
            ("tini --", "sh", Some(""), "ls", "ls"),
        ];
        for (entrypoint, command, option, arguments, expected) in cases {
            let image = ImageProcess {
                entrypoint: words(entrypoint),
                command: words(command),
                ..ImageProcess::default()
            };
            let options = ProcessOptions {
                entrypoint: option.map(str::to_owned),
                arguments: words(arguments),
                ..ProcessOptions::default()
            };
            assert_eq!(made(&image, &options).unwrap().argv, words(expected));
        }
    }

    #[test]
    fn no_command_anywhere_names_the_image() {
        let image = ImageProcess::default();
        let no_entrypoint = ProcessOptions {
            entrypoint: Some(String::new()),
            ..ProcessOptions::default()
        };
        for options in [ProcessOptions::default(), no_entrypoint] {
            let sentence = made(&image, &options).unwrap_err().to_string();
            assert!(
                sentence.contains("image img names no command"),
                "{sentence}"
            );
        }
    }

    fn with_env(image: &str, options: &[&str]) -> Result<Vec<String>, ProcessError> {
        let image = ImageProcess {
            command: words("env"),
            env: words(image),
            ..ImageProcess::default()
        };
        let options = ProcessOptions {
            env: options.iter().map(|o| (*o).to_owned()).collect(),
            ..ProcessOptions::default()
        };
        made(&image, &options).map(|process| process.env)
    }

    #[test]
    fn the_environment_is_the_images_overridden_by_name() {
        let cases: [(&str, &[&str], &str); 6] = [
            ("A=1 B=2", &[], "A=1 B=2"),
            ("A=1 B=2", &["A=3"], "B=2 A=3"),
            ("A=1", &["B=x=y", "B=z"], "A=1 B=z"),
            ("AB=1", &["A="], "AB=1 A="),
            ("", &["FROM_HERE"], "FROM_HERE=here"),
            ("GONE=1 A=1", &["GONE"], "A=1"),
        ];
        for (image, options, expected) in cases {
            assert_eq!(with_env(image, options).unwrap(), words(expected));
        }
        assert_eq!(
            with_env("", &["=x"]),
            Err(ProcessError::NoName("=x".to_owned()))
        );
        assert_eq!(
            with_env("", &["A=\0"]),
            Err(ProcessError::Nul("the environment"))
        );
    }

    #[test]
    fn user_and_workdir_override_the_images() {
        let image = ImageProcess {
            command: words("id"),
            workdir: "/srv".to_owned(),
            user: "www".to_owned(),
            ..ImageProcess::default()
        };
        let plain = made(&image, &ProcessOptions::default()).unwrap();
        assert_eq!((&*plain.cwd, &*plain.user), ("/srv", "www"));
        let options = ProcessOptions {
            workdir: Some("/tmp".to_owned()),
            user: Some("1000:1000".to_owned()),
            ..ProcessOptions::default()
        };
        let process = made(&image, &options).unwrap();
        assert_eq!((&*process.cwd, &*process.user), ("/tmp", "1000:1000"));
        let relative = ProcessOptions {
            workdir: Some("tmp".to_owned()),
            ..ProcessOptions::default()
        };
        assert!(matches!(
            made(&image, &relative),
            Err(ProcessError::RelativeWorkdir(_))
        ));
    }
}
