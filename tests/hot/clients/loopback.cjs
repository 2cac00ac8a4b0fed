// Preloaded into the client (node --require): what listens, listens on the loopback interface, and nothing leaves it.
// The client binds its peer-to-peer ports to 0.0.0.0 whatever it is told.
'use strict'
const net = require('node:net')
const dgram = require('node:dgram')

const LOOPBACK = '127.0.0.1'
const local = (host) => host === undefined || host === 'localhost' || host.startsWith('127.')

const listen = net.Server.prototype.listen
net.Server.prototype.listen = function (first, ...rest) {
  if (typeof first === 'number') {
    return listen.call(this, first, LOOPBACK, ...rest.filter((argument) => typeof argument === 'function'))
  }
  return listen.call(this, { ...first, host: LOOPBACK }, ...rest)
}

const bind = dgram.Socket.prototype.bind
dgram.Socket.prototype.bind = function (port, ...rest) {
  return bind.call(this, port, LOOPBACK, ...rest.filter((argument) => typeof argument === 'function'))
}

const send = dgram.Socket.prototype.send
dgram.Socket.prototype.send = function (...words) {
  if (!words.some((word) => typeof word === 'string' && word.startsWith('127.'))) {
    throw new Error('a test client may not leave the loopback interface')
  }
  return send.apply(this, words)
}

const connect = net.Socket.prototype.connect
net.Socket.prototype.connect = function (...words) {
  const options = Array.isArray(words[0]) ? words[0][0] : words[0]
  if (typeof options === 'object' && options !== null && !options.path && !local(options.host)) {
    throw new Error('a test client may not leave the loopback interface')
  }
  return connect.apply(this, words)
}
