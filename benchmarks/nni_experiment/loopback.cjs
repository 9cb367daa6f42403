// Loaded into NNI's node process: its dashboard, which has no password, listens on this machine alone.
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...given) {
  if (typeof given[0] === 'number' || /^\d+$/.test(String(given[0]))) {
    const rest = given.slice(1).filter((value) => typeof value !== 'string');
    return listen.call(this, Number(given[0]), '127.0.0.1', ...rest);
  }
  if (given[0] && typeof given[0] === 'object' && 'port' in given[0]) {
    return listen.call(this, { ...given[0], host: '127.0.0.1' }, ...given.slice(1));
  }
  return listen.apply(this, given);
};
