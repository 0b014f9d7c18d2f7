//! A client of the pod API: a connection per call, blocking, with the pod's own sentences as errors.
#![forbid(unsafe_code)]

mod incoming;

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::RecvFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use incoming::Incoming;

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
    head: Head,
    stream: UnixStream,
}

/// What matters of a response's head.
#[derive(Debug)]
struct Head {
    status: u16,
    length: Option<u64>,
}

/// A raw stream that was asked for. What the pod is asked is not lost while it starts: the answer comes when it serves.
#[derive(Debug)]
pub struct Upgrading(UnixStream);

impl Upgrading {
    /// Waits for the answer.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn finish(self) -> Result<UnixStream, ApiError> {
        Ok(good(read_head(self.0)?)?.stream)
    }
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
        let response = self.request(method, path, &body)?;
        let text = response.text()?;
        let text: &[u8] = if text.is_empty() { b"null" } else { &text };
        Ok(serde_json::from_slice(text)?)
    }

    /// Reads with `GET`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let response = self.request("GET", path, &[])?;
        Ok(serde_json::from_slice(&response.text()?)?)
    }

    /// Reads a body that is not JSON: metrics, a file.
    ///
    /// # Errors
    /// [`ApiError`]; a body that is shorter than was announced is an I/O error.
    pub fn read(&self, path: &str) -> Result<Vec<u8>, ApiError> {
        let response = self.request("GET", path, &[])?;
        let announced = response.head.length;
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
        let response = self.request("GET", path, &[])?;
        Ok(BufReader::new(response.stream))
    }

    /// A raw stream.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn upgrade(&self, path: &str) -> Result<UnixStream, ApiError> {
        self.begin_upgrade(path)?.finish()
    }

    /// Asks for a raw stream, and does not wait for the answer.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn begin_upgrade(&self, path: &str) -> Result<Upgrading, ApiError> {
        Ok(Upgrading(self.send("GET", path, &[], true)?))
    }

    /// Calls, and does not wait for the answer.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn begin(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Incoming, ApiError> {
        let body = serde_json::to_vec(body)?;
        Ok(Incoming::new(self.send(method, path, &body, false)?)?)
    }

    /// Reads with `GET`, and does not wait for the answer.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn begin_get(&self, path: &str) -> Result<Incoming, ApiError> {
        Ok(Incoming::new(self.send("GET", path, &[], false)?)?)
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Response, ApiError> {
        good(read_head(self.send(method, path, body, false)?)?)
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        upgrade: bool,
    ) -> Result<UnixStream, ApiError> {
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
        Ok(stream)
    }
}

/// The response, if it is no refusal.
fn good(response: Response) -> Result<Response, ApiError> {
    match response.head.status {
        ..400 => Ok(response),
        status => Err(refused(status, &response.text()?)),
    }
}

fn refused(status: u16, body: &[u8]) -> ApiError {
    ApiError::Refused {
        status,
        sentence: sentence(body),
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
    let mut bytes = Vec::new();
    let mut piece = [0; 1024];
    loop {
        let (_, seen) = match rustix::net::recv(&stream, &mut piece, RecvFlags::PEEK) {
            Ok((_, 0)) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Err(rustix::io::Errno::INTR) => continue,
            result => result.map_err(io::Error::from)?,
        };
        let before = bytes.len();
        bytes.extend_from_slice(&piece[..seen]);
        let head = Head::parse(&bytes)?;
        let of_it = head.as_ref().map_or(seen, |(_, length)| length - before);
        stream.read_exact(&mut piece[..of_it])?;
        match head {
            Some((head, _)) => return Ok(Response { head, stream }),
            None if bytes.len() > MAX_HEAD => return Err(httparse::Error::Token.into()),
            None => {}
        }
    }
}

impl Head {
    /// The head that `bytes` begin with, and its length; `None`: it is not whole.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, httparse::Error> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = parsed.parse(bytes)? else {
            return Ok(None);
        };
        let mut headers = parsed.headers.iter();
        let announced = headers.find(|h| h.name.eq_ignore_ascii_case("content-length"));
        let head = Self {
            status: parsed.code.unwrap_or(500),
            length: announced.and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok()),
        };
        Ok(Some((head, length)))
    }
}

impl Response {
    fn text(self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let length = match (self.head.status, self.head.length) {
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
