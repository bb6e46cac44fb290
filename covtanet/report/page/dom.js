/** Short forms for building the page. Text goes in as text, never as HTML. */

/** Return the element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Return a new element with these properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
