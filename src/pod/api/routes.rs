//! The API's routes: one table, which `resources/openapi.yaml` describes.
#![forbid(unsafe_code)]

use super::http::{MAX_BODY, Refusal};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    Pod,
    Stop,
    Stats,
    Metrics,
    Events,
    List,
    Create,
    Status,
    Remove,
    Start,
    Kill,
    Wait,
    Pause,
    Resume,
    Update,
    Resize,
    Logs,
    ReopenLog,
    Attach,
    Exec,
    ExecWait,
    ExecKill,
    ExecResize,
    ExecAttach,
    Port,
    Interfaces,
    AttachInterface,
    DetachInterface,
    LimitInterface,
    ReadFile,
    Volumes,
    CreateVolume,
    RemoveVolume,
    PutFiles,
}

/// Method, path, route. `{…}` stands for one segment.
pub(crate) const ROUTES: &[(&str, &str, Route)] = &[
    ("GET", "/v1/pod", Route::Pod),
    ("POST", "/v1/pod/stop", Route::Stop),
    ("GET", "/v1/stats", Route::Stats),
    ("GET", "/metrics", Route::Metrics),
    ("GET", "/v1/events", Route::Events),
    ("GET", "/v1/ports/{port}", Route::Port),
    ("GET", "/v1/containers", Route::List),
    ("POST", "/v1/containers", Route::Create),
    ("GET", "/v1/containers/{container}", Route::Status),
    ("DELETE", "/v1/containers/{container}", Route::Remove),
    ("POST", "/v1/containers/{container}/start", Route::Start),
    ("POST", "/v1/containers/{container}/kill", Route::Kill),
    ("GET", "/v1/containers/{container}/wait", Route::Wait),
    ("POST", "/v1/containers/{container}/pause", Route::Pause),
    ("POST", "/v1/containers/{container}/resume", Route::Resume),
    (
        "POST",
        "/v1/containers/{container}/resources",
        Route::Update,
    ),
    ("POST", "/v1/containers/{container}/resize", Route::Resize),
    ("GET", "/v1/containers/{container}/logs", Route::Logs),
    (
        "POST",
        "/v1/containers/{container}/logs/reopen",
        Route::ReopenLog,
    ),
    (
        "GET",
        "/v1/containers/{container}/attach/{stream}",
        Route::Attach,
    ),
    ("GET", "/v1/containers/{container}/file", Route::ReadFile),
    ("POST", "/v1/containers/{container}/execs", Route::Exec),
    ("GET", "/v1/execs/{exec}/wait", Route::ExecWait),
    ("POST", "/v1/execs/{exec}/kill", Route::ExecKill),
    ("POST", "/v1/execs/{exec}/resize", Route::ExecResize),
    ("GET", "/v1/execs/{exec}/attach/{stream}", Route::ExecAttach),
    ("GET", "/v1/interfaces", Route::Interfaces),
    ("POST", "/v1/interfaces", Route::AttachInterface),
    (
        "DELETE",
        "/v1/interfaces/{interface}",
        Route::DetachInterface,
    ),
    (
        "PUT",
        "/v1/interfaces/{interface}/limits",
        Route::LimitInterface,
    ),
    ("GET", "/v1/volumes", Route::Volumes),
    ("POST", "/v1/volumes", Route::CreateVolume),
    ("DELETE", "/v1/volumes/{volume}", Route::RemoveVolume),
    ("PUT", "/v1/volumes/{volume}/files", Route::PutFiles),
];

/// Most bytes of a set of files as JSON: [`cube_guest::files::MAX_SET`] in base64, and the names.
const MAX_FILES_BODY: usize = 24 << 20;

/// Most bytes of the body of a request with this path.
pub(crate) fn body_limit(path: &str) -> usize {
    match matches("/v1/volumes/{volume}/files", path) {
        Some(_) => MAX_FILES_BODY,
        None => MAX_BODY,
    }
}

/// Finds the route, and the segments that stand in its braces.
///
/// # Errors
/// 404 for a path that is not there, 405 for a method that it does not take.
pub(crate) fn find(method: &str, path: &str) -> Result<(Route, Vec<String>), Refusal> {
    let mut taken = Vec::new();
    for (known, pattern, route) in ROUTES {
        let Some(segments) = matches(pattern, path) else {
            continue;
        };
        if *known == method {
            return Ok((*route, segments));
        }
        taken.push(*known);
    }
    Err(match taken.as_slice() {
        [] => Refusal::new(404, "no such path: see resources/openapi.yaml"),
        methods => Refusal::new(405, format!("this path takes {}", methods.join(", "))),
    })
}

fn matches(pattern: &str, path: &str) -> Option<Vec<String>> {
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    let mut segments = Vec::new();
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(segments),
            (Some(want), Some(have)) if want.starts_with('{') && !have.is_empty() => {
                segments.push(have.to_owned());
            }
            (Some(want), Some(have)) if want == have => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn paths_and_methods_are_told_apart() {
        let (route, segments) = find("POST", "/v1/containers/a/kill").unwrap();
        assert_eq!((route, segments), (Route::Kill, vec!["a".to_owned()]));
        assert_eq!(find("GET", "/v1/containers/").unwrap_err().status, 404);
        assert_eq!(
            find("GET", "/v1/containers/a/kill").unwrap_err().status,
            405
        );
    }

    #[test]
    fn only_sets_of_files_may_be_large() {
        assert_eq!(body_limit("/v1/volumes/v/files"), MAX_FILES_BODY);
        assert_eq!(body_limit("/v1/volumes"), MAX_BODY);
        assert_eq!(body_limit("/v1/containers/v/files"), MAX_BODY);
        let encoded = cube_guest::files::MAX_SET.div_ceil(3) * 4;
        assert!(encoded + (1 << 20) <= MAX_FILES_BODY as u64);
    }

    #[test]
    fn the_description_and_the_table_have_the_same_routes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/openapi.yaml");
        let text = std::fs::read_to_string(path).unwrap();
        let document: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        let mut described = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                if method != "parameters" {
                    assert!(operation["summary"].is_string(), "{method} {path}");
                    assert!(operation["responses"].is_object(), "{method} {path}");
                    described.insert(format!("{} {path}", method.to_uppercase()));
                }
            }
        }
        let served = ROUTES
            .iter()
            .map(|(method, path, _)| format!("{method} {path}"));
        assert_eq!(described, served.collect());
    }
}
