//! Joins two interfaces: what enters one leaves by the other, by tc (ingress qdisc, u32 filter that matches
//! everything, mirred redirect). Faster than a bridge, and the machine has the interface's own MAC and
//! addresses.
#![forbid(unsafe_code)]

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::rtnetlink::Rtnetlink;

/// `ETH_P_ALL`, as the filter's header has it: the low half of `info`, in network byte order.
const ALL_PROTOCOLS: u32 = 0x0003u16.to_be() as u32;

/// The filter's priority, the high half of `info`.
const PRIORITY: u32 = 1 << 16;

/// Redirects everything that enters each of two interfaces, by index, to the other.
///
/// # Errors
/// The kernel's answer.
pub fn join(netlink: &Rtnetlink, one: u32, other: u32) -> io::Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        netlink.create(ingress(from))?;
        netlink.create(filter(from, to))?;
    }
    Ok(())
}

/// The qdisc that filters hang on.
fn ingress(index: u32) -> RouteNetlinkMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.handle = TcHandle {
        major: u16::MAX,
        minor: 0,
    };
    message.header.parent = TcHandle::INGRESS;
    message
        .attributes
        .push(TcAttribute::Kind("ingress".to_owned()));
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

fn filter(from: u32, to: u32) -> RouteNetlinkMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    let mut selector = TcU32Selector::default();
    // One key whose mask is zero: everything matches.
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let options = [
        TcFilterU32Option::Selector(selector),
        TcFilterU32Option::Action(vec![action]),
    ];
    let mut message = TcMessage::default();
    message.header.index = from.cast_signed();
    message.header.parent = TcHandle {
        major: u16::MAX,
        minor: 0,
    };
    message.header.info = PRIORITY | ALL_PROTOCOLS;
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(options.map(TcOption::U32).into()),
    ];
    RouteNetlinkMessage::NewTrafficFilter(message)
}
