//! A client of the pod API: a connection per call, blocking, with the pod's own sentences as errors.
#![forbid(unsafe_code)]

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::pod::supervisor::API_SOCKET;

/// Most bytes of a response's head.
const MAX_HEAD: usize = 16 << 10;

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody listens: the pod is not there, or has ended.
    #[error("no pod {0} runs here: `cube ps` shows those that do")]
    NoPod(String),
    /// The pod said no.
    #[error("{sentence}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its sentence, with the field's name.
        sentence: String,
    },
    /// The connection broke.
    #[error("the connection to the pod broke: {0}")]
    Io(#[from] io::Error),
    /// The response is none.
    #[error("the pod answered what is not HTTP: {0}")]
    Http(#[from] httparse::Error),
    /// The body is not what was expected.
    #[error("the pod answered what this version of cube does not understand: {0}")]
    Json(#[from] serde_json::Error),
}

/// The API of one pod.
#[derive(Debug, Clone)]
pub struct PodApi {
    id: String,
    socket: PathBuf,
}

/// A response whose body is still to be read.
struct Response {
    status: u16,
    length: Option<u64>,
    stream: UnixStream,
}

impl PodApi {
    /// The API of pod `id` under `base`.
    pub fn of(base: &Path, id: &str) -> Self {
        Self {
            id: id.to_owned(),
            socket: base.join(id).join(API_SOCKET),
        }
    }

    /// The pod's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Calls and takes the answer's JSON; an answer without a body is `null`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let body = serde_json::to_vec(body)?;
        let response = self.request(method, path, &body, false)?;
        let text = response.text()?;
        let text: &[u8] = if text.is_empty() { b"null" } else { &text };
        Ok(serde_json::from_slice(text)?)
    }

    /// Reads with `GET`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let response = self.request("GET", path, &[], false)?;
        Ok(serde_json::from_slice(&response.text()?)?)
    }

    /// Reads a body that is not JSON: metrics, a file.
    ///
    /// # Errors
    /// [`ApiError`]; a body that is shorter than was announced is an I/O error.
    pub fn read(&self, path: &str) -> Result<Vec<u8>, ApiError> {
        let response = self.request("GET", path, &[], false)?;
        let announced = response.length;
        let body = response.text()?;
        match announced {
            Some(length) if length != body.len() as u64 => {
                Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
            }
            _ => Ok(body),
        }
    }

    /// A body that goes on, such as events or a followed log.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn follow(&self, path: &str) -> Result<BufReader<UnixStream>, ApiError> {
        let response = self.request("GET", path, &[], false)?;
        Ok(BufReader::new(response.stream))
    }

    /// A raw stream.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn upgrade(&self, path: &str) -> Result<UnixStream, ApiError> {
        Ok(self.request("GET", path, &[], true)?.stream)
    }

    fn request(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        upgrade: bool,
    ) -> Result<Response, ApiError> {
        let mut stream = UnixStream::connect(&self.socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ApiError::NoPod(self.id.clone())
            }
            _ => ApiError::Io(error),
        })?;
        let upgrade = match upgrade {
            true => "Connection: Upgrade\r\nUpgrade: cube-stream\r\n",
            false => "",
        };
        let length = body.len();
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: pod\r\nContent-Length: {length}\r\n{upgrade}\r\n"
        )
        .into_bytes();
        request.extend_from_slice(body);
        stream.write_all(&request)?;
        let response = read_head(stream)?;
        if response.status < 400 {
            return Ok(response);
        }
        let status = response.status;
        let text = response.text()?;
        Err(ApiError::Refused {
            status,
            sentence: sentence(&text),
        })
    }
}

/// The sentence of an error's body, with the field that it is about.
fn sentence(body: &[u8]) -> String {
    let error: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let text = error["error"].as_str().unwrap_or("the pod gave no reason");
    match error["field"].as_str() {
        Some(field) => format!("{field}: {text}"),
        None => text.to_owned(),
    }
}

/// Reads a head and not a byte more: what follows may be a raw stream.
fn read_head(mut stream: UnixStream) -> Result<Response, ApiError> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > MAX_HEAD {
            return Err(httparse::Error::Token.into());
        }
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Response::new(&mut headers);
    parsed.parse(&head)?;
    let length = parsed
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
    Ok(Response {
        status: parsed.code.unwrap_or(500),
        length,
        stream,
    })
}

impl Response {
    fn text(self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let length = match (self.status, self.length) {
            (_, Some(length)) => length,
            (204, None) => 0,
            (_, None) => u64::MAX,
        };
        self.stream.take(length).read_to_end(&mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
