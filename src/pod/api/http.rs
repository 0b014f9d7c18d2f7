//! Requests out of bytes: a pure state machine, fed by whoever holds the socket.
//!
//! The client is not trusted to be well: head, body and number of headers are bounded before anything is
//! kept, and every refusal is a sentence with a status.
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

use serde::de::DeserializeOwned;

/// Most bytes of a request line and its headers.
pub const MAX_HEAD: usize = 16 << 10;
/// Most bytes of a body that is a specification and not data.
pub const MAX_BODY: usize = 1 << 20;
/// Most headers.
const MAX_HEADERS: usize = 64;

/// A request that is not served, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct Refusal {
    /// HTTP status (RFC 9110, section 15).
    pub status: u16,
    /// What, and what to do. Never a value of the body, which may be a secret.
    pub sentence: String,
    /// The field of the body or query that is at fault.
    pub field: Option<String>,
}

impl Refusal {
    /// A refusal that no field is to blame for.
    pub fn new(status: u16, sentence: impl Into<String>) -> Self {
        Self {
            status,
            sentence: sentence.into(),
            field: None,
        }
    }

    /// The fault of one field.
    pub fn field(field: impl Into<String>, sentence: impl Into<String>) -> Self {
        Self {
            status: 400,
            sentence: sentence.into(),
            field: Some(field.into()),
        }
    }
}

/// A whole request. `Debug` does not show the body: it may hold secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// The path, not decoded: what the API's names are made of needs no escapes.
    pub path: String,
    /// Names and values after `?`, not decoded; see [`Request::text`].
    pub query: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// Whether the connection is to become a raw stream (RFC 9110, section 7.8).
    pub upgrade: bool,
    /// Whether the client closes the connection after the response.
    pub close: bool,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("method", &self.method)
            .field("path", &self.path)
            .field("body", &format_args!("<{} bytes>", self.body.len()))
            .finish_non_exhaustive()
    }
}

impl Request {
    /// The body as JSON; an empty one is `{}`.
    ///
    /// # Errors
    /// A refusal that names the field.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        let body: &[u8] = if self.body.is_empty() {
            b"{}"
        } else {
            &self.body
        };
        let mut json = serde_json::Deserializer::from_slice(body);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let inner = error.inner();
            let (line, column) = (inner.line(), inner.column());
            let said = inner.to_string();
            // Serde's other sentences quote the value that was found.
            let names_only = ["unknown field", "missing field", "duplicate field"];
            let reason = if names_only.iter().any(|start| said.starts_with(start)) {
                said
            } else if inner.is_data() {
                format!("the value has the wrong type or form at line {line} column {column}")
            } else {
                format!("the body is not JSON from line {line} column {column} on")
            };
            Refusal::field(path, reason)
        })?;
        json.end()
            .map_err(|_| Refusal::new(400, "the body goes on after its JSON value"))?;
        Ok(value)
    }

    /// A text of the query, its escapes (RFC 3986, section 2.1) decoded.
    ///
    /// # Errors
    /// It is there and not UTF-8, or its escapes are none.
    pub fn text(&self, name: &str) -> Result<Option<String>, Refusal> {
        let value = self.query.iter().find(|(key, _)| key == name);
        let sentence = || Refusal::field(name, format!("`{name}` takes percent-encoded UTF-8"));
        value
            .map(|(_, value)| decode(value).ok_or_else(sentence))
            .transpose()
    }

    /// A number of the query.
    ///
    /// # Errors
    /// It is there and not a number.
    pub fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let value = self.query.iter().find(|(key, _)| key == name);
        value
            .map(|(_, value)| {
                value
                    .parse()
                    .map_err(|_| Refusal::field(name, format!("`{name}` takes a number")))
            })
            .transpose()
    }

    /// A switch of the query: `name`, `name=1`, `name=true`.
    pub fn switch(&self, name: &str) -> bool {
        let value = self.query.iter().find(|(key, _)| key == name);
        value.is_some_and(|(_, value)| matches!(value.as_str(), "" | "1" | "true"))
    }
}

/// Decodes `%2F` and the like.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high << 4 | low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Head of a request whose body is still to come.
#[derive(Debug)]
struct Head {
    request: Request,
    head_length: usize,
    body_length: usize,
}

/// Most bytes of the body of a request with this path.
pub type BodyLimit = fn(path: &str) -> usize;

/// Takes bytes, gives requests.
#[derive(Debug)]
pub struct Parser {
    bytes: Vec<u8>,
    head: Option<Head>,
    body_limit: BodyLimit,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new(|_| MAX_BODY)
    }
}

impl Parser {
    /// A parser whose bodies are limited by their requests' paths.
    pub fn new(body_limit: BodyLimit) -> Self {
        Self {
            bytes: Vec::new(),
            head: None,
            body_limit,
        }
    }

    /// Adds what arrived. The owner calls [`Parser::take`] between reads, which bounds what is kept.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether nothing has arrived behind the last request taken.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What came after the last request taken: the first bytes of an upgraded stream.
    pub fn into_rest(self) -> Vec<u8> {
        self.bytes
    }

    /// The next whole request, if it has arrived.
    ///
    /// # Errors
    /// What arrived is no request that this server takes; the connection is to be closed.
    pub fn take(&mut self) -> Result<Option<Request>, Refusal> {
        if self.head.is_none() {
            self.head = parse_head(&self.bytes, self.body_limit)?;
        }
        let Some(head) = &self.head else {
            return Ok(None);
        };
        let end = head.head_length.saturating_add(head.body_length);
        if self.bytes.len() < end {
            return Ok(None);
        }
        let rest = self.bytes.split_off(end);
        let mut body = std::mem::replace(&mut self.bytes, rest);
        body.drain(..head.head_length);
        Ok(self.head.take().map(|head| Request {
            body,
            ..head.request
        }))
    }
}

fn parse_head(bytes: &[u8], body_limit: BodyLimit) -> Result<Option<Head>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = bytes.get(..bytes.len().min(MAX_HEAD)).unwrap_or_default();
    let head_length = match parsed.parse(head) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD => {
            let sentence = format!("the request's head is longer than {MAX_HEAD} bytes");
            return Err(Refusal::new(431, sentence));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let sentence = format!("the request has more than {MAX_HEADERS} headers");
            return Err(Refusal::new(431, sentence));
        }
        Err(error) => return Err(Refusal::new(400, format!("not an HTTP request: {error}"))),
    };
    let target = parsed.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: path.to_owned(),
        query: query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        body: Vec::new(),
        upgrade: false,
        close: parsed.version == Some(0),
    };
    let mut body_length = None;
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let length = value
                .parse::<usize>()
                .ok()
                .filter(|_| value.bytes().all(|b| b.is_ascii_digit()))
                .ok_or_else(|| Refusal::new(400, "Content-Length is not a number"))?;
            // Two lengths are two opinions on where the next request begins.
            if body_length.replace(length).is_some() {
                return Err(Refusal::new(400, "Content-Length was given twice"));
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Refusal::new(
                411,
                "send the body with Content-Length: transfer codings are not supported",
            ));
        } else if header.name.eq_ignore_ascii_case("upgrade") {
            request.upgrade = true;
        } else if header.name.eq_ignore_ascii_case("connection") {
            request.close |= value.eq_ignore_ascii_case("close");
        }
    }
    let body_length = body_length.unwrap_or(0);
    let most = body_limit(&request.path);
    if body_length > most {
        let sentence = format!("the body is longer than {most} bytes");
        return Err(Refusal::new(413, sentence));
    }
    Ok(Some(Head {
        request,
        head_length,
        body_length,
    }))
}

/// A response with a JSON body; `204` has none.
pub fn response(status: u16, body: Option<&serde_json::Value>, close: bool) -> Vec<u8> {
    let body = body.map_or(String::new(), |body| format!("{body}\n"));
    text_response(status, "application/json", &body, close)
}

/// A response with a body of another type.
pub fn text_response(status: u16, content_type: &str, body: &str, close: bool) -> Vec<u8> {
    let length = match status {
        204 => String::new(),
        _ => format!("Content-Length: {}\r\n", body.len()),
    };
    let connection = if close { "Connection: close\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: {content_type}\r\n{length}{connection}\r\n{body}",
        reason(status)
    )
    .into_bytes()
}

/// The head of a file's last `sent` bytes, of `size`.
pub fn file_head(size: u64, sent: u64) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {sent}\r\n\
         {FILE_SIZE}: {size}\r\nConnection: close\r\n\r\n"
    )
    .into_bytes()
}

/// The header that tells the size of a file of which the body may be a part.
pub const FILE_SIZE: &str = "Cube-File-Size";

/// The head of a body that ends with the connection.
pub fn stream_head(content_type: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nConnection: close\r\n\r\n")
        .into_bytes()
}

/// The last words of HTTP on a connection that becomes a raw stream.
pub const SWITCHING: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: cube-stream\r\n\r\n";

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Option<Request>, Refusal> {
        let mut parser = Parser::default();
        parser.push(text.as_bytes());
        parser.take()
    }

    proptest! {
        #[test]
        fn requests_survive_any_fragmentation(
            bodies in prop::collection::vec("[a-z{}]{0,60}", 1..6),
            step in 1_usize..40,
        ) {
            let text: String = bodies
                .iter()
                .map(|b| format!("POST /v1/x?tail=3&follow HTTP/1.1\r\ncontent-length: {}\r\n\r\n{b}", b.len()))
                .collect();
            let mut parser = Parser::default();
            let mut taken = Vec::new();
            for piece in text.as_bytes().chunks(step) {
                parser.push(piece);
                while let Some(request) = parser.take().unwrap() {
                    prop_assert_eq!(request.number("tail"), Ok(Some(3)));
                    prop_assert!(request.switch("follow") && !request.switch("other"));
                    taken.push(String::from_utf8(request.body).unwrap());
                }
            }
            prop_assert_eq!(taken, bodies);
            prop_assert!(parser.is_empty());
        }

        #[test]
        fn any_bytes_are_a_request_a_refusal_or_a_wait(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut parser = Parser::default();
            parser.push(&bytes);
            while let Ok(Some(_)) = parser.take() {}
        }
    }

    #[test]
    fn limits_and_ambiguities_are_refused_with_their_status() {
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(MAX_HEAD));
        let headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        let cases = [
            (long.as_str(), 431),
            (headers.as_str(), 431),
            ("GET / HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n", 413),
            ("GET / HTTP/1.1\r\ncontent-length: +1\r\n\r\nx", 400),
            (
                "GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
                400,
            ),
            ("GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 411),
            ("\x16\x03\x01", 400),
        ];
        for (text, status) in cases {
            assert_eq!(parse(text).unwrap_err().status, status, "{text:.40}");
        }
    }

    #[test]
    fn a_path_may_have_a_limit_of_its_own() {
        let take = |path: &str, length: usize| {
            let mut parser = Parser::new(|path| if path == "/big" { 100 } else { 10 });
            let body = "x".repeat(length);
            let head = format!("PUT {path} HTTP/1.1\r\ncontent-length: {length}\r\n\r\n");
            parser.push((head + &body + "GET").as_bytes());
            let taken = parser.take().map(|request| request.unwrap().body.len());
            (taken.map_err(|refusal| refusal.status), parser.into_rest())
        };
        assert_eq!(take("/big", 100), (Ok(100), b"GET".to_vec()));
        assert_eq!(take("/big", 101).0, Err(413));
        assert_eq!(take("/small", 11).0, Err(413));
    }

    #[test]
    fn texts_of_the_query_are_decoded() {
        let text = |value: &str| {
            let request = parse(&format!("GET /?path={value} HTTP/1.1\r\n\r\n"));
            request.unwrap().unwrap().text("path")
        };
        assert_eq!(text("/a%20b%C3%a9"), Ok(Some("/a bé".to_owned())));
        assert_eq!(text("plain+"), Ok(Some("plain+".to_owned())));
        for wrong in ["%", "%2", "%zz", "%ff"] {
            assert_eq!(text(wrong).unwrap_err().field.as_deref(), Some("path"));
        }
        let none = parse("GET / HTTP/1.1\r\n\r\n").unwrap().unwrap();
        assert_eq!(none.text("path"), Ok(None));
    }

    fn refused<T: DeserializeOwned + std::fmt::Debug>(body: &str) -> Refusal {
        let request = Request {
            body: body.into(),
            ..parse("GET / HTTP/1.1\r\n\r\n").unwrap().unwrap()
        };
        request.json::<T>().unwrap_err()
    }

    #[test]
    fn a_body_at_fault_names_its_field_and_no_value() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Body {
            #[allow(dead_code)]
            env: Vec<u32>,
        }
        let refusal = refused::<Body>;
        let wrong = refusal(r#"{"env": [1, "hunter2"]}"#);
        assert_eq!(wrong.field.as_deref(), Some("env[1]"));
        assert!(!wrong.sentence.contains("hunter2"), "{wrong}");
        assert!(
            refusal(r#"{"x": 1}"#)
                .sentence
                .contains("unknown field `x`")
        );
        assert!(refusal("{}").sentence.contains("missing field `env`"));
        assert!(refusal("{").sentence.contains("not JSON"));
    }

    #[test]
    fn hooks_and_propagation_are_refused_by_name() {
        use crate::pod::api::body::CreateContainer;
        for (body, name) in [
            (r#"{"hooks": {"prestart": []}}"#, "hooks"),
            (r#"{"mounts": [{"propagation": "shared"}]}"#, "propagation"),
        ] {
            let refusal = refused::<CreateContainer>(body);
            let named = format!("unknown field `{name}`");
            assert!(refusal.sentence.contains(&named), "{refusal}");
        }
    }
}
