//! What `cube run` asks of its pod's API: all of it at once, before there is a pod, and without waiting.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;

use cube_guest::Stdio;
use serde::Serialize;

use super::stdio::Output;
use crate::client::{ApiError, Incoming, PodApi, Upgrading};
use crate::pod::api::body::Exit;
use crate::pod::event_log::PodEventRecord;

/// What was asked, and is not answered.
#[derive(Debug)]
pub(crate) struct Asked {
    /// The container, by its path in the API.
    path: String,
    /// The outputs, and where they go.
    pub(super) outputs: Vec<(Output, Upgrading)>,
    /// The standard input.
    pub(super) input: Option<Upgrading>,
    /// A terminal's stream, for both.
    pub(super) terminal: Option<Upgrading>,
    events: Option<Incoming>,
    exit: Option<Incoming>,
    /// Signals and window sizes.
    calls: Vec<Incoming>,
}

impl Asked {
    /// Attaches to the streams of `container`, then follows what happens to it.
    pub(crate) fn of(api: &PodApi, container: &str, stdio: &Stdio) -> Result<Self, ApiError> {
        let path = format!("/v1/containers/{container}");
        let attach = |stream: &str| api.begin_upgrade(&format!("{path}/attach/{stream}"));
        let (mut outputs, mut input, mut terminal) = (Vec::new(), None, None);
        match stdio {
            Stdio::Null => {}
            Stdio::Terminal { .. } => terminal = Some(attach("tty")?),
            Stdio::Pipes { stdin, .. } => {
                outputs.push((Output::Stdout, attach("stdout")?));
                outputs.push((Output::Stderr, attach("stderr")?));
                input = stdin.map(|_| attach("stdin")).transpose()?;
            }
        }
        Ok(Self {
            outputs,
            input,
            terminal,
            exit: Some(api.begin_get(&format!("{path}/wait"))?),
            events: Some(api.begin_get("/v1/events?follow=1")?),
            calls: Vec::new(),
            path,
        })
    }

    /// Asks something of the container. It cannot be asked only at the end of the pod.
    pub(super) fn call(&mut self, api: &PodApi, what: &str, body: &impl Serialize) {
        let path = format!("{}/{what}", self.path);
        self.calls.extend(api.begin("POST", &path, body));
    }

    /// Descriptors to poll for reading, level-triggered.
    pub(super) fn interests(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let all = self.events.iter().chain(&self.exit).chain(&self.calls);
        all.filter_map(Incoming::interest)
    }

    /// The next event, if it has come.
    pub(super) fn next_event(&mut self) -> Result<Option<PodEventRecord>, ApiError> {
        let Some(events) = &mut self.events else {
            return Ok(None);
        };
        events.turn()?;
        let event = events.line().map(|line| serde_json::from_slice(&line));
        if event.is_none() && events.is_over() {
            self.events = None;
        }
        Ok(event.transpose()?)
    }

    /// Whether no event will come any more: the pod has gone, or is about to.
    pub(super) fn is_over(&self) -> bool {
        self.events.is_none()
    }

    /// How the container ended, once all of its output was sent.
    pub(super) fn exit(&mut self) -> Result<Option<Exit>, ApiError> {
        let Some(exit) = &mut self.exit else {
            return Ok(None);
        };
        exit.turn()?;
        let answer = exit.answer();
        if answer.is_some() || exit.is_over() {
            self.exit = None;
        }
        answer.transpose()
    }

    /// Calls that the guest has not answered.
    pub(super) fn unanswered(&self) -> usize {
        self.calls.len()
    }

    /// Forgets the calls that were answered. They are refused only at the end of the pod, when there is nobody to
    /// signal.
    pub(super) fn forget_answered(&mut self) -> Result<(), ApiError> {
        for call in &mut self.calls {
            call.turn()?;
        }
        let is_open = |call: &Incoming| !call.is_complete() && !call.is_over();
        self.calls.retain(is_open);
        Ok(())
    }

    /// The API broke: nothing more is expected of it.
    pub(super) fn give_up(&mut self) {
        (self.events, self.exit, self.terminal) = (None, None, None);
        self.calls.clear();
    }
}
